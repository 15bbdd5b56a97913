"""1,255,384 parameters, 626,392 active; 6,078,464 tokens.

python train.py configs/ladder/second/c_moe_v1_c2.1e13_d104.py

2.1e+13 training FLOPs, 2.1e+13 asked. train.py derives
adam_lr 0.0206356, hyper_lr 0.0111776, beta1 0.9062, beta2 0.95, eps 5.27136e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 104                        # [derived: scaling.py]
num_heads = 13                          # [derived: scaling.py]
num_layers = 3                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 56                         # [derived: scaling.py]
shared_dim = 104                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 2968                            # [derived: scaling.py]
run_dir = 'out/second_c_moe_v1_c2.1e13_d104' # [derived: scaling.py]

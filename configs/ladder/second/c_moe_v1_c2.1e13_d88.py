"""939,224 parameters, 483,032 active; 7,942,144 tokens.

python train.py configs/ladder/second/c_moe_v1_c2.1e13_d88.py

2.1e+13 training FLOPs, 2.1e+13 asked. train.py derives
adam_lr 0.020353, hyper_lr 0.0110246, beta1 0.9062, beta2 0.95, eps 6.02552e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 88                         # [derived: scaling.py]
num_heads = 11                          # [derived: scaling.py]
num_layers = 3                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 48                         # [derived: scaling.py]
shared_dim = 88                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 3878                            # [derived: scaling.py]
run_dir = 'out/second_c_moe_v1_c2.1e13_d88' # [derived: scaling.py]

"""560,160 parameters, 329,760 active; 12,718,080 tokens.

python train.py configs/ladder/second/c_moe_v1_c2.1e13_d80.py

2.1e+13 training FLOPs, 2.1e+13 asked. train.py derives
adam_lr 0.0184643, hyper_lr 0.0100015, beta1 0.9062, beta2 0.95, eps 7.62495e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 80                         # [derived: scaling.py]
num_heads = 10                          # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 40                         # [derived: scaling.py]
shared_dim = 80                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 6210                            # [derived: scaling.py]
run_dir = 'out/second_c_moe_v1_c2.1e13_d80' # [derived: scaling.py]

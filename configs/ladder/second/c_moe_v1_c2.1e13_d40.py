"""200,960 parameters, 131,840 active; 33,345,536 tokens.

python train.py configs/ladder/second/c_moe_v1_c2.1e13_d40.py

2.1e+13 training FLOPs, 2.1e+13 asked. train.py derives
adam_lr 0.0181675, hyper_lr 0.00984071, beta1 0.9062, beta2 0.95, eps 1.23465e-15."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 40                         # [derived: scaling.py]
num_heads = 5                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 40                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 16282                           # [derived: scaling.py]
run_dir = 'out/second_c_moe_v1_c2.1e13_d40' # [derived: scaling.py]

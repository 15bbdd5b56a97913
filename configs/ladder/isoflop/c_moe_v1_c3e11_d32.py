"""133,568 parameters, 96,704 active; 663,552 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3e11_d32.py

2.996e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0593574, hyper_lr 0.0321519, beta1 0.9062, beta2 0.95, eps 1.74166e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 32                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 32                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 324                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3e11_d32' # [derived: scaling.py]

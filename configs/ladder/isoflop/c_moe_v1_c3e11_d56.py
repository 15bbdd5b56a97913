"""343,728 parameters, 214,704 active; 284,672 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3e11_d56.py

2.997e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0613016, hyper_lr 0.033205, beta1 0.9062, beta2 0.95, eps 1.14077e-16."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 28                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 56                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 56                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 139                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3e11_d56' # [derived: scaling.py]

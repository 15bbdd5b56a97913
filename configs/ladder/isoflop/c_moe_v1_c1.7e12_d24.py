"""99,648 parameters, 72,000 active; 5,124,096 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c1.7e12_d24.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0371283, hyper_lr 0.0201112, beta1 0.9062, beta2 0.95, eps 4.83988e-16."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 24                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 24                         # [derived: scaling.py]
num_heads = 1                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 24                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 2502                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c1.7e12_d24' # [derived: scaling.py]

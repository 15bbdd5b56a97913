"""52,352 parameters, 43,136 active; 3,631,104 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c7e11_d16.py

7e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.0474841, hyper_lr 0.0257206, beta1 0.9062, beta2 0.95, eps 4.07423e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 16                         # [derived: scaling.py]
num_heads = 1                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 8                          # [derived: scaling.py]
shared_dim = 16                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1773                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c7e11_d16' # [derived: scaling.py]

"""1,749,216 parameters, 846,048 active; 1,843,200 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c9e12_d112.py

8.997e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0280902, hyper_lr 0.0152155, beta1 0.9062, beta2 0.95, eps 2.90277e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 112                        # [derived: scaling.py]
num_heads = 14                          # [derived: scaling.py]
num_layers = 4                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 56                         # [derived: scaling.py]
shared_dim = 112                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 900                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c9e12_d112' # [derived: scaling.py]

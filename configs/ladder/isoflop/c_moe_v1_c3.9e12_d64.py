"""400,256 parameters, 252,800 active; 3,119,104 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3.9e12_d64.py

3.9e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0297632, hyper_lr 0.0161217, beta1 0.9062, beta2 0.95, eps 3.77608e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 64                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 4                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 64                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1523                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3.9e12_d64' # [derived: scaling.py]

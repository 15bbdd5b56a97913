"""200,960 parameters, 131,840 active; 477,184 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3e11_d40.py

3.005e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0599944, hyper_lr 0.032497, beta1 0.9062, beta2 0.95, eps 1.47696e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 40                         # [derived: scaling.py]
num_heads = 5                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 40                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 233                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3e11_d40' # [derived: scaling.py]

"""200,960 parameters, 131,840 active; 6,193,152 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3.9e12_d40.py

3.9e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0291716, hyper_lr 0.0158013, beta1 0.9062, beta2 0.95, eps 5.32086e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 40                         # [derived: scaling.py]
num_heads = 5                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 40                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 3024                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3.9e12_d40' # [derived: scaling.py]

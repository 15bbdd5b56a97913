"""205,840 parameters, 136,720 active; 1,071,104 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c7e11_d40.py

7e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.0477896, hyper_lr 0.025886, beta1 0.9062, beta2 0.95, eps 2.2128e-16."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 20                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 40                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 40                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 523                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c7e11_d40' # [derived: scaling.py]

"""205,840 parameters, 136,720 active; 2,600,960 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c1.7e12_d40.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0372347, hyper_lr 0.0201688, beta1 0.9062, beta2 0.95, eps 3.4482e-16."""
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
steps = 1270                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c1.7e12_d40' # [derived: scaling.py]

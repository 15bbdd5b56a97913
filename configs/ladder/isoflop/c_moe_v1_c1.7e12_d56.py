"""333,536 parameters, 204,512 active; 1,699,840 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c1.7e12_d56.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0370822, hyper_lr 0.0200862, beta1 0.9062, beta2 0.95, eps 2.7876e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 56                         # [derived: scaling.py]
num_heads = 7                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 56                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 830                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c1.7e12_d56' # [derived: scaling.py]

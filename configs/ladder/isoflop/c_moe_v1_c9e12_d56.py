"""343,728 parameters, 214,704 active; 8,548,352 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c9e12_d56.py

9.001e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0235418, hyper_lr 0.0127518, beta1 0.9062, beta2 0.95, eps 6.25125e-16."""
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
steps = 4174                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c9e12_d56' # [derived: scaling.py]

"""343,728 parameters, 214,704 active; 3,704,832 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c3.9e12_d56.py

3.901e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0297841, hyper_lr 0.0161331, beta1 0.9062, beta2 0.95, eps 4.11538e-16."""
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
steps = 1809                            # [derived: scaling.py]
run_dir = 'out/rung_runs_c_moe_v1_c3.9e12_d56' # [derived: scaling.py]

"""1,311,856 parameters, 682,864 active; 2,383,872 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c9e12_d104.py

9.001e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0268515, hyper_lr 0.0145445, beta1 0.9062, beta2 0.95, eps 3.30117e-16."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 52                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 104                        # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 3                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 56                         # [derived: scaling.py]
shared_dim = 104                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1164                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c9e12_d104' # [derived: scaling.py]

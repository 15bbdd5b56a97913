"""979,088 parameters, 522,896 active; 3,139,584 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c9e12_d88.py

9e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0264248, hyper_lr 0.0143134, beta1 0.9062, beta2 0.95, eps 3.78845e-16."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 44                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 88                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 3                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 48                         # [derived: scaling.py]
shared_dim = 88                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1533                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c9e12_d88' # [derived: scaling.py]

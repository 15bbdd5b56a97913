"""979,088 parameters, 522,896 active; 1,359,872 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3.9e12_d88.py

3.898e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0334371, hyper_lr 0.0181118, beta1 0.9062, beta2 0.95, eps 2.4933e-16."""
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
steps = 664                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3.9e12_d88' # [derived: scaling.py]

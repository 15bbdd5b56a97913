"""1,311,856 parameters, 682,864 active; 24,100,864 tokens.

python train.py configs/ladder/hero/c_moe_v1_c9.1e13_d104_s1.py

9.1e+13 training FLOPs, 9.1e+13 asked. train.py derives
adam_lr 0.0140066, hyper_lr 0.00758689, beta1 0.9062, beta2 0.95, eps 1.04964e-15."""
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
steps = 11768                           # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/hero_c_moe_v1_c9.1e13_d104_s1' # [derived: scaling.py]

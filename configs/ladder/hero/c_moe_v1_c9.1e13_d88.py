"""939,224 parameters, 483,032 active; 34,414,592 tokens.

python train.py configs/ladder/hero/c_moe_v1_c9.1e13_d88.py

9.1e+13 training FLOPs, 9.1e+13 asked. train.py derives
adam_lr 0.013474, hyper_lr 0.00729841, beta1 0.9062, beta2 0.95, eps 1.25429e-15."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 88                         # [derived: scaling.py]
num_heads = 11                          # [derived: scaling.py]
num_layers = 3                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 48                         # [derived: scaling.py]
shared_dim = 88                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 16804                           # [derived: scaling.py]
run_dir = 'out/hero_c_moe_v1_c9.1e13_d88' # [derived: scaling.py]

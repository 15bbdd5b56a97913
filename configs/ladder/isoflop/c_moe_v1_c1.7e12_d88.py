"""939,224 parameters, 483,032 active; 643,072 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c1.7e12_d88.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.041278, hyper_lr 0.0223589, beta1 0.9062, beta2 0.95, eps 1.71457e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 88                         # [derived: scaling.py]
num_heads = 11                          # [derived: scaling.py]
num_layers = 3                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 48                         # [derived: scaling.py]
shared_dim = 88                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 314                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c1.7e12_d88' # [derived: scaling.py]

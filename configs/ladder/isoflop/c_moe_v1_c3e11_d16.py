"""52,352 parameters, 43,136 active; 1,556,480 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3e11_d16.py

3e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0602611, hyper_lr 0.0326414, beta1 0.9062, beta2 0.95, eps 2.66746e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 16                         # [derived: scaling.py]
num_heads = 1                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 8                          # [derived: scaling.py]
shared_dim = 16                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 760                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3e11_d16' # [derived: scaling.py]

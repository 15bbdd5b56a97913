"""136,512 parameters, 99,648 active; 645,120 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3e11_d32.py

3.002e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0598297, hyper_lr 0.0324077, beta1 0.9062, beta2 0.95, eps 1.7173e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 32                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 32                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 315                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3e11_d32' # [derived: scaling.py]

"""136,512 parameters, 99,648 active; 1,503,232 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c7e11_d32_s1.py

6.996e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.0471597, hyper_lr 0.0255448, beta1 0.9062, beta2 0.95, eps 2.62143e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 32                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 32                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 734                             # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_c_moe_v1_c7e11_d32_s1' # [derived: scaling.py]

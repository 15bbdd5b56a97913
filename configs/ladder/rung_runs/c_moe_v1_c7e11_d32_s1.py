"""133,568 parameters, 96,704 active; 1,550,336 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c7e11_d32_s1.py

7.001e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.0467522, hyper_lr 0.0253241, beta1 0.9062, beta2 0.95, eps 2.66219e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 32                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 32                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 757                             # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_c_moe_v1_c7e11_d32_s1' # [derived: scaling.py]

"""99,648 parameters, 72,000 active; 905,216 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c3e11_d24_s1.py

3.003e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0604626, hyper_lr 0.0327506, beta1 0.9062, beta2 0.95, eps 2.03424e-16."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 24                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 24                         # [derived: scaling.py]
num_heads = 1                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 24                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 442                             # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_c_moe_v1_c3e11_d24_s1' # [derived: scaling.py]

"""72,384 parameters, 72,384 active; 897,024 tokens.

python train.py configs/ladder/rung_runs/a_dense_adamw_c3e11_d24_s1.py

2.997e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0303087, hyper_lr 0.131338, beta1 0.9, beta2 0.95, eps 1e-08."""
from configs.ladder.rungs.a_dense_adamw import *

head_dim = 24                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 24                         # [derived: scaling.py]
num_heads = 1                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 96                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 438                             # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_a_dense_adamw_c3e11_d24_s1' # [derived: scaling.py]

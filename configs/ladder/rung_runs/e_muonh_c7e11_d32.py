"""284,096 parameters, 99,776 active; 1,488,896 tokens.

python train.py configs/ladder/rung_runs/e_muonh_c7e11_d32.py

6.998e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.103611, hyper_lr 0.0280614, beta1 0.9062, beta2 0.95, eps 2.60893e-16."""
from configs.ladder.rungs.e_muonh import *

hidden_dim = 32                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 32                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 727                             # [derived: scaling.py]
run_dir = 'out/rung_runs_e_muonh_c7e11_d32' # [derived: scaling.py]

"""984,448 parameters, 247,168 active; 3,190,784 tokens.

python train.py configs/ladder/rung_runs/e_muonh_c3.9e12_d64.py

3.901e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0691025, hyper_lr 0.0187153, beta1 0.9062, beta2 0.95, eps 3.81926e-16."""
from configs.ladder.rungs.e_muonh import *

hidden_dim = 64                         # [derived: scaling.py]
num_heads = 8                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 64                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1558                            # [derived: scaling.py]
run_dir = 'out/rung_runs_e_muonh_c3.9e12_d64' # [derived: scaling.py]

"""141,440 parameters, 141,440 active; 1,017,856 tokens.

python train.py configs/ladder/rung_runs/b_dense_adamh_c7e11_d40.py

6.996e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.09696, hyper_lr 0.02626, beta1 0.9062, beta2 0.95, eps 2.15709e-16."""
from configs.ladder.rungs.b_dense_adamh import *

recipe = 'v1'                           # [carried over]
hidden_dim = 40                         # [derived: scaling.py]
num_heads = 5                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 5                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 160                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 497                             # [derived: scaling.py]
run_dir = 'out/rung_runs_b_dense_adamh_c7e11_d40' # [derived: scaling.py]

"""226,352 parameters, 226,352 active; 3,473,408 tokens.

python train.py configs/ladder/rung_runs/a_dense_adamw_c3.9e12_d56.py

3.9e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0151647, hyper_lr 0.0657138, beta1 0.9, beta2 0.95, eps 1e-08."""
from configs.ladder.rungs.a_dense_adamw import *

head_dim = 28                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 56                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 224                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1696                            # [derived: scaling.py]
run_dir = 'out/rung_runs_a_dense_adamw_c3.9e12_d56' # [derived: scaling.py]

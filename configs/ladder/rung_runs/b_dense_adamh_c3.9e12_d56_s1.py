"""226,352 parameters, 226,352 active; 3,473,408 tokens.

python train.py configs/ladder/rung_runs/b_dense_adamh_c3.9e12_d56_s1.py

3.9e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0606589, hyper_lr 0.0164284, beta1 0.9062, beta2 0.95, eps 3.98478e-16."""
from configs.ladder.rungs.b_dense_adamh import *

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
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_b_dense_adamh_c3.9e12_d56_s1' # [derived: scaling.py]

"""104,768 parameters, 104,768 active; 1,411,072 tokens.

python train.py configs/ladder/rung_runs/b_dense_adamh_c7e11_d32.py

7.001e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.096013, hyper_lr 0.0260035, beta1 0.9062, beta2 0.95, eps 2.53981e-16."""
from configs.ladder.rungs.b_dense_adamh import *

recipe = 'v1'                           # [carried over]
hidden_dim = 32                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 128                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 689                             # [derived: scaling.py]
run_dir = 'out/rung_runs_b_dense_adamh_c7e11_d32' # [derived: scaling.py]

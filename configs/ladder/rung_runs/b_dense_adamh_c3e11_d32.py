"""104,896 parameters, 104,896 active; 600,064 tokens.

python train.py configs/ladder/rung_runs/b_dense_adamh_c3e11_d32.py

3.005e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.122121, hyper_lr 0.0330745, beta1 0.9062, beta2 0.95, eps 1.65625e-16."""
from configs.ladder.rungs.b_dense_adamh import *

recipe = 'v1'                           # [carried over]
hidden_dim = 32                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 4                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 128                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 293                             # [derived: scaling.py]
run_dir = 'out/rung_runs_b_dense_adamh_c3e11_d32' # [derived: scaling.py]

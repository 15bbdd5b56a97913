"""104,896 parameters, 104,896 active; 600,064 tokens.

python train.py configs/ladder/rung_runs/a_dense_adamw_c3e11_d32.py

3.005e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0305303, hyper_lr 0.132298, beta1 0.9, beta2 0.95, eps 1e-08."""
from configs.ladder.rungs.a_dense_adamw import *

recipe = 'v1'                           # [carried over]
hidden_dim = 32                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 4                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 128                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 293                             # [derived: scaling.py]
run_dir = 'out/rung_runs_a_dense_adamw_c3e11_d32' # [derived: scaling.py]

"""328,896 parameters, 328,896 active; 2,322,432 tokens.

python train.py configs/ladder/rung_runs/a_dense_adamw_c3.9e12_d72.py

3.901e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0154834, hyper_lr 0.0670947, beta1 0.9, beta2 0.95, eps 1e-08."""
from configs.ladder.rungs.a_dense_adamw import *

recipe = 'v1'                           # [carried over]
hidden_dim = 72                         # [derived: scaling.py]
num_heads = 9                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 9                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 288                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1134                            # [derived: scaling.py]
run_dir = 'out/rung_runs_a_dense_adamw_c3.9e12_d72' # [derived: scaling.py]

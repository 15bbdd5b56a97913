"""275,328 parameters, 275,328 active; 6,496,256 tokens.

python train.py configs/ladder/rung_runs/a_dense_adamw_c9e12_d64.py

9e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0121065, hyper_lr 0.0524614, beta1 0.9, beta2 0.95, eps 1e-08."""
from configs.ladder.rungs.a_dense_adamw import *

recipe = 'v1'                           # [carried over]
hidden_dim = 64                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 4                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 256                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 3172                            # [derived: scaling.py]
run_dir = 'out/rung_runs_a_dense_adamw_c9e12_d64' # [derived: scaling.py]

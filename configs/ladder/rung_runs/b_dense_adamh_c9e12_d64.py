"""275,328 parameters, 275,328 active; 6,496,256 tokens.

python train.py configs/ladder/rung_runs/b_dense_adamh_c9e12_d64.py

9e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0484259, hyper_lr 0.0131153, beta1 0.9062, beta2 0.95, eps 5.44951e-16."""
from configs.ladder.rungs.b_dense_adamh import *

recipe = 'v1'                           # [carried over]
hidden_dim = 64                         # [derived: scaling.py]
num_heads = 4                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 4                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 256                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 3172                            # [derived: scaling.py]
run_dir = 'out/rung_runs_b_dense_adamh_c9e12_d64' # [derived: scaling.py]

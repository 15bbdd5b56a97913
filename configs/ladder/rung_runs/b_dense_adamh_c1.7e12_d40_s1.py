"""141,200 parameters, 141,200 active; 2,498,560 tokens.

python train.py configs/ladder/rung_runs/b_dense_adamh_c1.7e12_d40_s1.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0753156, hyper_lr 0.020398, beta1 0.9062, beta2 0.95, eps 3.37964e-16."""
from configs.ladder.rungs.b_dense_adamh import *

head_dim = 20                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 40                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 0                          # [derived: scaling.py]
shared_dim = 160                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1220                            # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_b_dense_adamh_c1.7e12_d40_s1' # [derived: scaling.py]

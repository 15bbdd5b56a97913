"""141,200 parameters, 141,200 active; 2,498,560 tokens.

python train.py configs/ladder/rung_runs/a_dense_adamw_c1.7e12_d40_s1.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0188289, hyper_lr 0.0815919, beta1 0.9, beta2 0.95, eps 1e-08."""
from configs.ladder.rungs.a_dense_adamw import *

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
run_dir = 'out/rung_runs_a_dense_adamw_c1.7e12_d40_s1' # [derived: scaling.py]

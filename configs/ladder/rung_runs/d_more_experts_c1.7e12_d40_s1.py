"""486,160 parameters, 140,560 active; 2,512,896 tokens.

python train.py configs/ladder/rung_runs/d_more_experts_c1.7e12_d40_s1.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0375972, hyper_lr 0.0203652, beta1 0.9062, beta2 0.95, eps 3.38933e-16."""
from configs.ladder.rungs.d_more_experts import *

head_dim = 20                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 40                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 40                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1227                            # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_d_more_experts_c1.7e12_d40_s1' # [derived: scaling.py]

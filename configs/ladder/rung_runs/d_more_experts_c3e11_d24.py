"""212,544 parameters, 74,304 active; 868,352 tokens.

python train.py configs/ladder/rung_runs/d_more_experts_c3e11_d24.py

3.001e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.0611738, hyper_lr 0.0331358, beta1 0.9062, beta2 0.95, eps 1.99239e-16."""
from configs.ladder.rungs.d_more_experts import *

head_dim = 24                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 24                         # [derived: scaling.py]
num_heads = 1                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 24                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 424                             # [derived: scaling.py]
run_dir = 'out/rung_runs_d_more_experts_c3e11_d24' # [derived: scaling.py]

"""865,200 parameters, 220,080 active; 3,594,240 tokens.

python train.py configs/ladder/rung_runs/d_more_experts_c3.9e12_d56_s1.py

3.9e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0300391, hyper_lr 0.0162712, beta1 0.9062, beta2 0.95, eps 4.05349e-16."""
from configs.ladder.rungs.d_more_experts import *

head_dim = 28                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 56                         # [derived: scaling.py]
num_heads = 2                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 56                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1755                            # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_d_more_experts_c3.9e12_d56_s1' # [derived: scaling.py]

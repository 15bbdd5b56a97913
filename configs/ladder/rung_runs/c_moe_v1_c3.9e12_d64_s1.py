"""388,480 parameters, 241,024 active; 3,289,088 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c3.9e12_d64_s1.py

3.9e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0293222, hyper_lr 0.0158828, beta1 0.9062, beta2 0.95, eps 3.87761e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 64                         # [derived: scaling.py]
num_heads = 8                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 2                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 64                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1606                            # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_c_moe_v1_c3.9e12_d64_s1' # [derived: scaling.py]

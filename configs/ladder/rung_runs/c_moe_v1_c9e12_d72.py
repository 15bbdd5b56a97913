"""513,504 parameters, 306,144 active; 5,865,472 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c9e12_d72.py

9e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0238623, hyper_lr 0.0129254, beta1 0.9062, beta2 0.95, eps 5.17818e-16."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 24                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 72                         # [derived: scaling.py]
num_heads = 3                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 3                        # [derived: scaling.py]
expert_dim = 40                         # [derived: scaling.py]
shared_dim = 72                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 2864                            # [derived: scaling.py]
run_dir = 'out/rung_runs_c_moe_v1_c9e12_d72' # [derived: scaling.py]

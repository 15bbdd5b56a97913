"""252,480 parameters, 169,536 active; 2,078,720 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c1.7e12_d48_s1.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0370857, hyper_lr 0.0200881, beta1 0.9062, beta2 0.95, eps 3.08265e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 48                         # [derived: scaling.py]
num_heads = 3                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 3                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 48                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1015                            # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_c_moe_v1_c1.7e12_d48_s1' # [derived: scaling.py]

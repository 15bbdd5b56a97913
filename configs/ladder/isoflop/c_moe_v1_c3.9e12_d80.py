"""579,840 parameters, 349,440 active; 2,211,840 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3.9e12_d80.py

3.899e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0302014, hyper_lr 0.0163591, beta1 0.9062, beta2 0.95, eps 3.17982e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 80                         # [derived: scaling.py]
num_heads = 5                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 5                        # [derived: scaling.py]
expert_dim = 40                         # [derived: scaling.py]
shared_dim = 80                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1080                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3.9e12_d80' # [derived: scaling.py]

"""579,840 parameters, 349,440 active; 5,105,664 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c9e12_d80.py

8.999e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0238688, hyper_lr 0.0129289, beta1 0.9062, beta2 0.95, eps 4.83117e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 80                         # [derived: scaling.py]
num_heads = 5                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 5                        # [derived: scaling.py]
expert_dim = 40                         # [derived: scaling.py]
shared_dim = 80                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 2493                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c9e12_d80' # [derived: scaling.py]

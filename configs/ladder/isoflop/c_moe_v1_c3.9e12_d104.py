"""1,255,384 parameters, 626,392 active; 1,128,448 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3.9e12_d104.py

3.898e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0331386, hyper_lr 0.0179501, beta1 0.9062, beta2 0.95, eps 2.27126e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 104                        # [derived: scaling.py]
num_heads = 13                          # [derived: scaling.py]
num_layers = 3                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 56                         # [derived: scaling.py]
shared_dim = 104                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 551                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3.9e12_d104' # [derived: scaling.py]

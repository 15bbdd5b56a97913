"""495,936 parameters, 288,576 active; 1,181,696 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c1.7e12_d72.py

1.699e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.037449, hyper_lr 0.0202849, beta1 0.9062, beta2 0.95, eps 2.32423e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 72                         # [derived: scaling.py]
num_heads = 9                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 40                         # [derived: scaling.py]
shared_dim = 72                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 577                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c1.7e12_d72' # [derived: scaling.py]

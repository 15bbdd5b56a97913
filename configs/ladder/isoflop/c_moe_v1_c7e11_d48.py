"""252,480 parameters, 169,536 active; 856,064 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c7e11_d48.py

7.002e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.0475979, hyper_lr 0.0257822, beta1 0.9062, beta2 0.95, eps 1.97824e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 48                         # [derived: scaling.py]
num_heads = 3                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 3                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 48                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 418                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c7e11_d48' # [derived: scaling.py]

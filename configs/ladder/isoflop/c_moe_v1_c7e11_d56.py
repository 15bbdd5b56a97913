"""333,536 parameters, 204,512 active; 700,416 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c7e11_d56.py

7.004e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.0475861, hyper_lr 0.0257758, beta1 0.9062, beta2 0.95, eps 1.78939e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 56                         # [derived: scaling.py]
num_heads = 7                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 56                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 342                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c7e11_d56' # [derived: scaling.py]

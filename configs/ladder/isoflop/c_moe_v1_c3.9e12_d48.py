"""252,480 parameters, 169,536 active; 4,767,744 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3.9e12_d48.py

3.9e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0293625, hyper_lr 0.0159047, beta1 0.9062, beta2 0.95, eps 4.66855e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 48                         # [derived: scaling.py]
num_heads = 3                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 3                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 48                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 2328                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3.9e12_d48' # [derived: scaling.py]

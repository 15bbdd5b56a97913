"""2,173,680 parameters, 1,067,760 active; 43,694,080 tokens.

python train.py configs/ladder/hero/c_moe_v1_c2.7e14_d120.py

2.7e+14 training FLOPs, 2.7e+14 asked. train.py derives
adam_lr 0.0112406, hyper_lr 0.00608865, beta1 0.9062, beta2 0.95, eps 1.41331e-15."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 20                           # [derived: scaling.py]
recipe = 'v1'                           # [carried over]
hidden_dim = 120                        # [derived: scaling.py]
num_heads = 6                           # [derived: scaling.py]
num_layers = 4                          # [derived: scaling.py]
num_kv_heads = 6                        # [derived: scaling.py]
expert_dim = 64                         # [derived: scaling.py]
shared_dim = 120                        # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 21335                           # [derived: scaling.py]
run_dir = 'out/hero_c_moe_v1_c2.7e14_d120' # [derived: scaling.py]

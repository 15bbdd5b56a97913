"""513,504 parameters, 306,144 active; 456,704 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c7e11_d72.py

7.008e+11 training FLOPs, 7e+11 asked. train.py derives
adam_lr 0.0489306, hyper_lr 0.0265041, beta1 0.9062, beta2 0.95, eps 1.44492e-16."""
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
steps = 223                             # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c7e11_d72' # [derived: scaling.py]

"""333,536 parameters, 204,512 active; 21,002,240 tokens.

python train.py configs/ladder/second/c_moe_v1_c2.1e13_d56.py

2.1e+13 training FLOPs, 2.1e+13 asked. train.py derives
adam_lr 0.0182821, hyper_lr 0.0099028, beta1 0.9062, beta2 0.95, eps 9.79848e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 56                         # [derived: scaling.py]
num_heads = 7                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 56                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 10255                           # [derived: scaling.py]
run_dir = 'out/second_c_moe_v1_c2.1e13_d56' # [derived: scaling.py]

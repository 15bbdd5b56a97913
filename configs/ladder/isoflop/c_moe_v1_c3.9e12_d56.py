"""333,536 parameters, 204,512 active; 3,899,392 tokens.

python train.py configs/ladder/isoflop/c_moe_v1_c3.9e12_d56.py

3.899e+12 training FLOPs, 3.9e+12 asked. train.py derives
adam_lr 0.0293583, hyper_lr 0.0159024, beta1 0.9062, beta2 0.95, eps 4.22206e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 56                         # [derived: scaling.py]
num_heads = 7                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 32                         # [derived: scaling.py]
shared_dim = 56                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1904                            # [derived: scaling.py]
run_dir = 'out/isoflop_c_moe_v1_c3.9e12_d56' # [derived: scaling.py]

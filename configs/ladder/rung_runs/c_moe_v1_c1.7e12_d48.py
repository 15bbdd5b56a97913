"""245,088 parameters, 162,144 active; 2,183,168 tokens.

python train.py configs/ladder/rung_runs/c_moe_v1_c1.7e12_d48.py

1.7e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0365777, hyper_lr 0.0198129, beta1 0.9062, beta2 0.95, eps 3.15914e-16."""
from configs.ladder.rungs.c_moe_v1 import *

recipe = 'v1'                           # [carried over]
hidden_dim = 48                         # [derived: scaling.py]
num_heads = 6                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 48                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1066                            # [derived: scaling.py]
run_dir = 'out/rung_runs_c_moe_v1_c1.7e12_d48' # [derived: scaling.py]

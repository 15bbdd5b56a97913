"""581,472 parameters, 166,752 active; 2,107,392 tokens.

python train.py configs/ladder/rung_runs/d_more_experts_c1.7e12_d48.py

1.699e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.036943, hyper_lr 0.0200108, beta1 0.9062, beta2 0.95, eps 3.10384e-16."""
from configs.ladder.rungs.d_more_experts import *

recipe = 'v1'                           # [carried over]
hidden_dim = 48                         # [derived: scaling.py]
num_heads = 6                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 48                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1029                            # [derived: scaling.py]
run_dir = 'out/rung_runs_d_more_experts_c1.7e12_d48' # [derived: scaling.py]

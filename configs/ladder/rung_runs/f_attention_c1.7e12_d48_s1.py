"""581,472 parameters, 166,752 active; 2,107,392 tokens.

python train.py configs/ladder/rung_runs/f_attention_c1.7e12_d48_s1.py

1.699e+12 training FLOPs, 1.7e+12 asked. train.py derives
adam_lr 0.0849953, hyper_lr 0.0230196, beta1 0.9062, beta2 0.95, eps 3.10387e-16."""
from configs.ladder.rungs.f_attention import *

hidden_dim = 48                         # [derived: scaling.py]
num_heads = 6                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 24                         # [derived: scaling.py]
shared_dim = 48                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 1029                            # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_f_attention_c1.7e12_d48_s1' # [derived: scaling.py]

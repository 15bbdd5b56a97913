"""1,349,856 parameters, 313,056 active; 5,711,872 tokens.

python train.py configs/ladder/rung_runs/f_attention_c9e12_d72_s1.py

9.002e+12 training FLOPs, 9e+12 asked. train.py derives
adam_lr 0.0539428, hyper_lr 0.0146095, beta1 0.9062, beta2 0.95, eps 5.10999e-16."""
from configs.ladder.rungs.f_attention import *

head_dim = 24                           # [derived: scaling.py]
hidden_dim = 72                         # [derived: scaling.py]
num_heads = 3                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 3                        # [derived: scaling.py]
expert_dim = 40                         # [derived: scaling.py]
shared_dim = 72                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 2789                            # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_f_attention_c9e12_d72_s1' # [derived: scaling.py]

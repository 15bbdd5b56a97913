"""212,544 parameters, 74,304 active; 868,352 tokens.

python train.py configs/ladder/rung_runs/f_attention_c3e11_d24_s1.py

3.001e+11 training FLOPs, 3e+11 asked. train.py derives
adam_lr 0.133858, hyper_lr 0.0362532, beta1 0.9062, beta2 0.95, eps 1.99241e-16."""
from configs.ladder.rungs.f_attention import *

head_dim = 24                           # [derived: scaling.py]
hidden_dim = 24                         # [derived: scaling.py]
num_heads = 1                           # [derived: scaling.py]
num_layers = 2                          # [derived: scaling.py]
num_kv_heads = 1                        # [derived: scaling.py]
expert_dim = 16                         # [derived: scaling.py]
shared_dim = 24                         # [derived: scaling.py]
window = 64                             # [derived: scaling.py]
steps = 424                             # [derived: scaling.py]
seed = 1                                # [carried over]
run_dir = 'out/rung_runs_f_attention_c3e11_d24_s1' # [derived: scaling.py]

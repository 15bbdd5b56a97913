"""Gate d1280 of recipe V1: 2.83e19 FLOP, 1.24e10 tokens.    python train.py configs/v1_d1280.py --plan

TPU v5p, 4 chips, 26.9 hours at the published 128,277 tokens a second [derived]. Expect: Paloma macro loss
3.0065 [cited: marin experiments/grug/moe, v16 baseline]. Run by us: no. See v1_d512.py."""
from configs.v1_d512 import *

hidden_dim = 1280
num_layers = 13
num_heads = 10
num_kv_heads = 2
shared_dim = 1280
expert_dim = 640

batch_size = 256                    # [derived] as in v1_d512.py
steps = 11_807                      # 1.24e10 tokens [derived]

"""Gate d768 of recipe V1: 1.70e18 FLOP, 2.71e9 tokens.    python train.py configs/v1_d768.py --plan

TPU v5p, 4 chips, 2.8 hours at the published 273,532 tokens a second [derived]. Expect: Paloma macro loss
3.4339 [cited: marin experiments/grug/moe, v16 baseline]. Run by us: no. See v1_d512.py."""
from configs.v1_d512 import *

hidden_dim = 768
num_layers = 8
num_heads = 6
num_kv_heads = 1
shared_dim = 768
expert_dim = 384

batch_size = 64                    # [derived] as in v1_d512.py
steps = 10_338                      # 2.71e9 tokens [derived]

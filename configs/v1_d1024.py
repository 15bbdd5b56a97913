"""Gate d1024 of recipe V1: 9.00e18 FLOP, 6.63e9 tokens.    python train.py configs/v1_d1024.py --plan

TPU v5p, 4 chips, 10.5 hours at the published 175,165 tokens a second [derived]. Expect: Paloma macro loss
3.1605 [cited: marin experiments/grug/moe, v16 baseline]. Run by us: no. See v1_d512.py."""
from configs.v1_d512 import *

hidden_dim = 1024
num_layers = 11
num_heads = 8
num_kv_heads = 2
shared_dim = 1024
expert_dim = 512

batch_size = 128                    # [derived] as in v1_d512.py
steps = 12_646                      # 6.63e9 tokens [derived]

"""Gate d1024 of recipe V2: 1.16e19 FLOP, 8.43e9 tokens.    python train.py configs/v2_d1024.py --plan

TPU v4, 16 chips, 10.7 hours at the published 219,720 tokens a second [derived]. Expect: Paloma macro loss
3.0195 [cited: marin #5951, May baseline]. Run by us: no. See v2_d512.py."""
from configs.v2_d512 import *
from configs.v1_d1024 import hidden_dim, num_layers, num_heads, num_kv_heads, shared_dim, expert_dim

batch_size = 128                    # x 4,096 tokens [cited: marin #5951]
steps = 16_080                      # [cited: marin #5951]

"""Gate d768 of recipe V2: 2.81e18 FLOP, 4.42e9 tokens.    python train.py configs/v2_d768.py --plan

TPU v4, 16 chips, 4.2 hours at the published 294,726 tokens a second [derived]. Expect: Paloma macro loss
3.2273 [cited: marin #5951, May baseline]. Run by us: no. See v2_d512.py."""
from configs.v2_d512 import *
from configs.v1_d768 import hidden_dim, num_layers, num_heads, num_kv_heads, shared_dim, expert_dim

batch_size = 64                    # x 4,096 tokens [cited: marin #5951]
steps = 16_875                      # [cited: marin #5951]

"""Gate d1280 of recipe V2: 3.46e19 FLOP, 1.50e10 tokens.    python train.py configs/v2_d1280.py --plan

TPU v4, 16 chips, 24.2 hours at the published 171,912 tokens a second [derived]. Expect: Paloma macro loss
2.8857 [cited: marin #5951, May baseline]. Run by us: no. See v2_d512.py."""
from configs.v2_d512 import *
from configs.v1_d1280 import hidden_dim, num_layers, num_heads, num_kv_heads, shared_dim, expert_dim

batch_size = 256                    # x 4,096 tokens [cited: marin #5951]
steps = 14_325                      # [cited: marin #5951]

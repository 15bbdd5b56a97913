"""Gate d512 of recipe V1: 2.19e17 FLOP, 8.37e8 tokens.    python train.py configs/v1_d512.py --plan

The four gates (d512, d768, d1024, d1280) are where Marin tests a change against the recipe: it must win at all
four. Hardware: TPU v5p, 4 chips (v5p-8), 0.6 hours at the published 405,630 tokens a second [derived].
Expect: Paloma macro loss 3.8104 [cited: marin experiments/grug/moe, v16 baseline]. Run by us: no.
Everything but sizes, batch and steps is the 129B run's: data, optimizer, schedule, losses. expert_dim is
hidden_dim / 2, shared_dim is hidden_dim, head_dim 128 [cited: marin #4697]."""
from configs.moe_129b_as_run import *

hidden_dim = 512
num_layers = 6
num_heads = 4
num_kv_heads = 1
shared_dim = 512
expert_dim = 256

batch_size = 32                     # x 4,096 tokens: the power of two that makes about 2^14 steps [derived]
steps = 6_386                       # 8.37e8 tokens [derived]
capacity_factor = 0.0               # one shard holds all experts: nothing can overflow
topology = "v5p:2x2x1"              # [cited: marin experiments/grug/moe]
expert_parallel = 1
exchange = "ring"
eval_every = 500                    # [assumed]

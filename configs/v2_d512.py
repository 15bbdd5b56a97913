"""Gate d512 of recipe V2: 3.82e17 FLOP, 1.44e9 tokens.    python train.py configs/v2_d512.py --plan

The recipe of May 2026: 256 experts, MuonH, half-RoPE, partial key offset, combine weights that sum to 2.5, no
router z-loss, no clipping. Hardware: TPU v4, 16 chips (v4-32), 0.9 hours at the published 433,986 tokens a
second [derived]. Expect: Paloma macro loss 3.5422 [cited: marin #5951, May baseline]. Run by us: no.
Sizes are v1_d512.py's but for the number of experts."""
from configs.v1_d512 import *

num_experts = 256                   # [cited: marin #5951], as are the values to min_lr_ratio
half_rope = True
last_layer_full = True              # [cited: marin #4976]
partial_key_offset = True
combine_sum = 2.5
router_z = 0.0
logit_z = 0.0
recipe = "v2"
optimizer = "muonh"
warmup = 0.01
clip = 0.0
min_lr_ratio = 0.05                 # as in the code of the time; its README says 0 [cited: marin, heuristic.py]

batch_size = 32                    # x 4,096 tokens [cited: marin #5951]
steps = 10_980                      # [cited: marin #5951]
topology = "v4:2x2x4"               # [cited: marin #5951]
expert_parallel = 2                 # a sum over all three axes of a torus is never scattered [measured: LOG.md]
capacity_factor = 1.25              # [cited: marin #4017]

"""Marin's 129B-A16B run in the layout that it had when it ended (recipe V1, April and May 2026).

    python train.py configs/moe_129b_as_run.py --plan [--compile]

Hardware: TPU v4, 1,024 chips (v4-2048). 25 days at the published 18 s a step, about 17 % MFU [derived: 120,332 x
18 s]. It began on v4-1024 with ring over 4: 43.1 s and 14.2 % MFU [cited: marin #4697, #4867; seconds derived from
tokens a second]. Model, data and training are those of moe_129b.py, and so is the loss. Run by us: no."""
from configs.moe_129b import *

remat = "block"                     # [cited: marin #4697: "recompute whole block"]
expert_parallel = 8                 # [cited: marin #4697]
weights_over = "data"               # what is no expert was split over "data" only [assumed]

"""Rung 4: MuonH, with recipe V2's rates, warm-up and last rate, without router z-loss and clipping."""
from configs.ladder.rungs.d_more_experts import *

optimizer = "muonh"
recipe = "v2"
warmup = 0.01                       # [cited: marin #5951], as are the next four
min_lr_ratio = 0.05
clip = 0.0
router_z = 0.0
logit_z = 0.0
adam_lr_scale = 16.0                   # [measured: ../pilot.csv]

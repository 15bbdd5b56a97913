"""Rung 0, the baseline: a dense model by AdamW as nanoGPT has it, its rate tuned (see ../README.md)."""
from configs.ladder.base import *

num_experts = 0
experts_per_token = 0
optimizer = "adamw"
beta1, beta2, eps = 0.9, 0.95, 1e-8     # [cited: nanoGPT], as is weight_decay, 0.1
lr_scale = 4.0                        # [measured: ../pilot.csv; 8 is as good]

"""Rung 2, MoE V1: 16 experts, 4 a token, balanced by quantiles; GQA. What the isoFLOP ladder trains."""
from configs.ladder.rungs.b_dense_adamh import *

num_experts = 16
experts_per_token = 4               # [cited: marin #4697]
adam_lr_scale = 8.0                    # [measured: ../pilot.csv]

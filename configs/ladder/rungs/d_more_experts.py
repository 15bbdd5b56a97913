"""Rung 3: four times the experts, as from 64 to 256 [cited: marin #5951]."""
from configs.ladder.rungs.c_moe_v1 import *

num_experts = 64

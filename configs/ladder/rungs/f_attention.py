"""Rung 5: half-RoPE, partial key offset, combine weights that sum to 2.5 [cited: marin #5951]."""
from configs.ladder.rungs.e_muonh import *

half_rope = True
last_layer_full = True
partial_key_offset = True
combine_sum = 2.5

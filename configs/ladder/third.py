"""The third ladder: MoE V1 in one smooth family. Every model has the same kinds of layers, and width is the only dial.

    python scaling.py ladder --config configs/ladder/third.py --count-head --batch 16 --layers 2 --unit 16 --group 1 ...

Two layers: one with a window, one that sees the whole sequence. For every 16 of the width there is a head of 16, with
its own keys and values; experts are half as wide as the model. The second ladder grew in depth, its heads were between
16 and 52 wide, and its models of one to three layers never saw the whole sequence (see README.md)."""
from configs.ladder.rungs.c_moe_v1 import *

last_layer_full = True
log_every = 20                      # rows for curves.py; a row costs less than a thousandth of that [measured]

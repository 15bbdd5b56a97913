"""The third ladder: MoE V1 in one smooth family. Every model has the same kinds of layers, and width is the only dial.

    python scaling.py ladder --config configs/ladder/third.py --count-head --batch 16 --layers 4 --unit 8 --group 1 ...

Four layers: three with a window, one that sees the whole sequence. For every 8 of the width there is a head of 16,
with its own keys and values; experts are half as wide as the model. The second ladder grew in depth, and its heads
between 16 and 52 wide; its models of one to three layers never saw the whole sequence (see README.md)."""
from configs.ladder.rungs.c_moe_v1 import *

log_every = 20                      # rows for curves.py; a row costs less than a thousandth of that [measured]

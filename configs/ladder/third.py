"""The third ladder: MoE V1 in one smooth family. Every model has the same kinds of layers, and width is the only dial.

    python scaling.py ladder --config configs/ladder/third.py --count-head --layers 2 --heads 2 --group 1 --unit 8 ...

Two layers: one with a window, one that sees the whole sequence. Two heads of half the width, with their own keys and
values; experts are half as wide as the model. The second ladder grew in depth, its heads were between 16 and 52 wide,
and its models of one to three layers never saw the whole sequence (see README.md). At 3e12 FLOPs and width 64 two heads
of 32 give 3.157, four of 16 3.199, one of 64 3.196, four layers of width 40 3.327 [measured: third/pilot.csv].

To be trained: 3e11, 1e12, 3e12, 1e13 and 3e13 FLOPs, five widths, 8, 6, 4, 3 and 2 seeds. Seeds spread by 0.31 %
[measured, at 3e11], so a vertex spreads by half of that over the root of its seeds [derived], 0.055 to 0.11 %, and the
forecast by 0.39 % at 3e14 and 0.59 % at 9e14, or by 0.12 and 0.13 % if E is known [noise.py --budgets]."""
from configs.ladder.rungs.c_moe_v1 import *

last_layer_full = True
log_every = 20                      # rows for curves.py; a row costs less than a thousandth of that [measured]

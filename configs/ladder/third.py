"""The third ladder: 16 experts with V2's attention in one smooth family. Width is the only dial.

    python scaling.py ladder --config configs/ladder/third.py --count-head --layers 2 --heads 2 --group 1 --unit 8 ...

Every model has the same kinds of layers: one with a window, one that sees the whole sequence. It has two heads of half
the width, at least 32, with their own keys and values; experts are half as wide as the model. The second ladder grew in
depth, its heads were between 16 and 52 wide, and its models of one to three layers never saw the whole sequence.

Four layers waste a small budget: at 3e12 FLOPs 3.33 nats, two layers 3.16 [measured: third/pilot.csv]. V2's key offset
lets a layer look for what came after an earlier token. At 3e12 and width 48 it lowers 3.14 to 3.00 [measured: LOG.md].
It needs heads of more than 20: at 1e12 two heads of 16, 20 and 24 give 3.585, 3.464 and 3.404 (widths 32, 40 and 48)
[measured: third/pilot.csv], and heads of 32 give 3.468 at width 32 and 3.411 at 48 (one seed) [measured: LOG.md].
Batches grow with the budget as C^(1/6), from 8 sequences at 3e11 FLOPs, to the nearest even number [assumed; 8 was
better than 4 and 16 at 3e11]. README.md has the fit and what other rates give.

Seeds spread by 0.6, 1.2, 1.2, 0.5 and 0.2 % at 3e11, 1e12, 3e12, 1e13 and 3e13, most in runs of 500 to 1,100 steps
[measured: noise.py third/runs.csv]."""
from configs.ladder.rungs.c_moe_v1 import *

head_dim = 32                       # the least
half_rope = True
last_layer_full = True
partial_key_offset = True
log_every = 20                      # rows for curves.py; a row costs less than a thousandth of that [measured]

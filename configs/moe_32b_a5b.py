"""Marin's 1e22 rehearsal: 34.6 B parameters, 4.7 B active (the "32B-A5B" of March and April 2026; recipe V1).

    python train.py configs/moe_32b_a5b.py --plan [--compile]

Hardware: TPU v4, 256 chips (v4-512). 326 B tokens, 13 days at the 14 % MFU of its successor [derived; its own
was not retrieved]. Expect: Paloma macro loss 2.389 as predicted, 2.432 as measured, without a loss spike; 0.027 better
when nothing is dropped in evaluation, as here [cited: marin #3800, mws.oa.dev 2026-04-06]. Run by us: no. Not from the V1
heuristic: rates and schedule are the run's own. Data, tokenizer and losses as in moe_129b.py."""
from configs.moe_129b_as_run import *

hidden_dim = 3200                   # [cited: marin #3800], as are the sizes to expert_dim
num_layers = 32
num_heads = 25
num_kv_heads = 25                   # every query head has its own
shared_dim = 3200
expert_dim = 1600

batch_size = 1024                   # x 4,096 tokens [cited: marin #3800], as are the values to decay
steps = 77_724
matrix_lr = 0.00405
adam_lr = 0.000863
beta2 = 0.968
eps = 2.73e-15
schedule = "wsd"
warmup = 0.1
decay = 0.2

topology = "v4:8x8x4"               # [cited: marin #3800]
expert_parallel = 4                 # [cited: marin #3800]
exchange = "ring"                   # ragged came only with the 129B run [assumed]

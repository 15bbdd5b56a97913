"""One small mixture of experts to compare balancers: python tests/arena.py trains it under each.

Half a million parameters, sixteen experts, two per token; the books of smoke.py. It is small enough
that all rules with three seeds (48 runs) take an hour on two quiet CPU cores, and large enough that
experts specialize: without a balancer the busiest carries 5.6 times its share. Every number that is
not tagged otherwise is [assumed]."""

from configs.smoke import mixture, tokenizer, vocab_size, seq_len, remat          # noqa: F401
from tests import rivals                # noqa: F401  the rules that are not in balance.py

hidden_dim = 64
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 32
shared_dim = 64                     # = hidden_dim, as in smoke.py
num_experts = 16
experts_per_token = 2
expert_dim = 32                     # = hidden_dim / 2, as in smoke.py
gated_norm_rank = 16

steps = 240
adam_lr_scale = 8.0                 # of 1, 8, 16, 32: 8 and 16 are best and equal [measured: LOG.md]
batch_size = 16                     # x 128 tokens
log_every = 10
eval_every = 240
save_every = 240
sample_tokens = 0

"""A mixture of experts trained on Shakespeare and the King James Bible while you watch.

    python train.py configs/smoke.py

Two CPU cores, two to seven minutes from an empty cache: 12 MB of text from the package index, a BPE trained on
it, 400 steps, evaluation on four unseen plays and sixteen unseen books, a sample, plots, a report. All
components of the 129B recipe are on. Run by us: yes; README has loss, time and a picture as measured. Every
number not tagged otherwise is [assumed]: picked for two cores."""

mixture = (("shakespeare", 0.55), ("kjv", 0.45))    # shares of the bytes [derived]
tokenizer = "bpe:2048"
vocab_size = 2048
seq_len = 128

hidden_dim = 128
num_layers = 4                      # three local layers and a full one
num_heads = 4
num_kv_heads = 1                    # four query heads to one key/value head [cited: marin #4697]
head_dim = 32
shared_dim = 128                    # = hidden_dim [cited: marin #4697]
num_experts = 8
experts_per_token = 2
expert_dim = 64                     # = hidden_dim / 2 [cited: marin #4697]
gated_norm_rank = 32
remat = "none"                      # memory is not the limit here
replicas = 0                        # so each device holds all weights, and no layer waits for a gather

steps = 400
lr_scale = 2.0                      # of 0.5, 1, 2, 4: 2 is best by 0.005 bits per byte [measured: LOG.md]
adam_lr_scale = 8.0                 # with it Adam's rate is 16 times the recipe's [measured: LOG.md]
batch_size = 16                     # x 128 tokens; at equal tokens better than 32 [measured: LOG.md]
prompt = "ROMEO."

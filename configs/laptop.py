"""The smoke run at half an hour: text that reads like its source.     python train.py configs/laptop.py

8.33 M parameters, 3.69 M active, 5.3 M tokens. Two CPU cores. Run by us: yes; README has time, bits per byte and a
sample as measured.
Every number not tagged otherwise is [assumed]: picked for two cores, not tuned."""

mixture = (("shakespeare", 0.55), ("kjv", 0.45))    # shares of the bytes [derived]
tokenizer = "bpe:4096"
vocab_size = 4096
seq_len = 256

hidden_dim = 192
num_layers = 6                      # local local local full local local: a period of four and a remainder
num_heads = 6
num_kv_heads = 2                    # the 129B run has four query heads to one; 6 divides by 3
head_dim = 32
shared_dim = 192                    # = hidden_dim [cited: marin #4697]
num_experts = 16
experts_per_token = 2
expert_dim = 96                     # = hidden_dim / 2 [cited: marin #4697]
gated_norm_rank = 32
remat = "none"                      # memory is not the limit here

steps = 1300
adam_lr_scale = 8.0                 # 0.005 bits per byte better than 1; 16 with lr_scale 2 is equal [measured: LOG.md]
batch_size = 16                     # x 256 tokens
eval_every = 260
save_every = 260
prompt = "MACBETH."
sample_tokens = 300

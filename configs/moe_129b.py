"""Marin's 129B-A16B mixture of experts at 1e23 FLOP, recipe V1, in the best layout that --plan --search finds.

    python train.py configs/moe_129b.py --plan              what it costs          (seconds, any machine)
    python train.py configs/moe_129b.py --plan --compile    the step through the TPU compiler         (minutes)
    python train.py configs/moe_129b.py                     the run, the same command on every host of the pod

Hardware: TPU v4, 1,024 chips (v4-2048). 1.01 T tokens. The compiled step is bound by 50 % MFU, in the layout of the
run that happened (moe_129b_as_run.py, April and May 2026) by 45 %; that run reached 17 % [configs/README.md].
Expect: Paloma macro loss 2.252 as preregistered, 2.234 as measured [cited: marin #4697]. Run by us: no.
Every number is tagged [cited: where], [derived] from others, or [assumed] by us."""

# 1.01e12 tokens [cited: marin #4697]. Weights are TiB of text [cited: marin experiments, nemotron mix]. The
# sources are token shards that a user prepares: DIR is what `python data.py prepare SOURCE --out=DIR` wrote.
mixture = (
    ("shards/nemotron_cc_hq_actual", 0.91351), ("shards/nemotron_cc_hq_synth", 2.72),
    ("shards/nemotron_cc_medium_high", 0.82471), ("shards/nemotron_cc_medium", 3.38),
    ("shards/nemotron_cc_medium_low", 1.54), ("shards/nemotron_cc_low_actual", 0.70123),
    ("shards/nemotron_cc_low_synth", 0.62771), ("shards/starcoder", 0.25), ("shards/proofpile_2", 0.055))
tokenizer = "shards/llama3.tiktoken"    # Llama 3's own vocabulary file (tokenizer.model) [cited: marin #4697]
vocab_size = 128_256                # [cited: marin #4697]
seq_len = 4096                      # [cited: marin #4697]

hidden_dim = 5120                   # [cited: marin #4697], as are the sizes to expert_dim
num_layers = 48
num_heads = 40
num_kv_heads = 10
head_dim = 128
shared_dim = 5120                   # = hidden_dim
num_experts = 64
experts_per_token = 4
expert_dim = 2560                   # = hidden_dim / 2
window = 2048                       # three layers of four; the fourth sees all 4,096 [cited: marin #4697]
router_z = 1e-3                     # [cited: marin #5601]
logit_z = 1e-4                      # [cited: marin #4697]
compute_dtype = "bfloat16"          # [cited: marin #4697]
remat = "attended"                  # recompute a block from two states, not from one [derived: --plan --search]
capacity_factor = 1.0               # [cited: marin #4017: 8 to 11 % faster than 1.25 for +0.001 bits per byte]

batch_size = 2048                   # x 4,096 = 8.4 M tokens [cited: marin #4697]
steps = 120_332                     # [cited: marin #4697]
recipe = "v1"                       # AdamH .005803, Adam .001339, beta2 .95, eps 3.36e-15 come out of it [derived]
optimizer = "adamh"                 # [cited: marin #4697]
schedule = "linear"                 # 10 % up, 90 % down to zero [cited: marin #4697]
warmup = 0.1
clip = 1.0                          # the run went on with 1.5 from step 50,654 [cited: marin #4697]
seed = 0                            # [cited: marin #4697]

topology = "v4:8x8x16"              # where the run ended [cited: marin #4697]
expert_parallel = 64                # one expert a chip of each plane of 8 x 8 [derived: --plan --search], as
exchange = "ragged"                 # are the next two; the drops at capacity 1.0 are in configs/README.md
weights_over = "expert+data"        # no gradient of a copy is summed

eval_every = 1000                   # [cited: marin #4697]
eval_tokens = 33_554_432            # of each domain: 8 batches of 1,024 x 4,096 [cited: marin #4697]
save_every = 1000                   # [cited: marin #4697, as the resumed runs had it]
sample_tokens = 0                   # one device cannot hold the model

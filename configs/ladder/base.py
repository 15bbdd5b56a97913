"""What every run of the ladder shares: reference corpus, tokenizer, the shape of a small model; see README.md.

    python configs/ladder/corpus.py                                     builds the corpus (two minutes, once)
    python train.py configs/ladder/rungs/c_moe_v1.py --help             (rungs add what differs, a run its sizes)

The corpus is corpus.txt: 327 MB of code, documentation and books, fixed by hash; as tokens its mixture has
sha256 1cd67b5362cc... Every number not tagged otherwise is [assumed]: picked for two CPU cores."""

_corpus = "out/ladder_corpus"
mixture = ((f"{_corpus}/code/*.jsonl", 0.75), (f"{_corpus}/docs/*.jsonl", 0.10),
           (f"{_corpus}/books/*.jsonl", 0.15))
tokenizer = "bpe:1024"              # fewest FLOPs a byte at these widths, the head counted [derived: README.md]
vocab_size = 1024
seq_len = 128

head_dim = 16                       # at 1.7e12 FLOPs 0.18 below heads of 8, like 24 and 48 [measured: pilot.csv]
num_experts = 16
experts_per_token = 4               # [cited: marin #4697]
gated_norm_rank = 16
remat = "none"

devices = 1                         # a step costs 53 ms of CPU, over two devices 72 [measured]; run two at a time
batch_size = 16                     # x 128 tokens, at every budget
log_every = 50
eval_every = 1_000_000_000          # only at the end: all of every held-out domain
save_every = 1000
keep = 1
sample_tokens = 0

"""One GPU, one hour: a 0.5 B mixture of experts on FineWeb-Edu.        python train.py configs/gpu_h200.py

Hardware: one H100 or H200 (any GPU with 40 GB and more will do). Text comes from the Hugging Face hub on the first
start; a byte-pair vocabulary is trained on it. About an hour at 20 % MFU [assumed; not timed]. Expected loss:
unknown, nobody has run it: the vocabulary and the data are not those of the published gates. Run by us: no.
Sizes and recipe are gate v1_d768.py's but for vocabulary, batch and length [assumed: what fits one GPU]."""
from configs.v1_d768 import *

mixture = (("hf:HuggingFaceFW/fineweb-edu:sample-10BT:text", 1.0),)
tokenizer = "bpe:32768"
vocab_size = 32_768
seq_len = 2048
window = 1024

batch_size = 128                    # x 2,048 = 262,144 tokens, as v1_d768.py has
accumulate = 8                      # 16 rows at a time
steps = 4000                        # 1.05 B tokens
topology = "h200:1"
published = ""
sample_tokens = 200

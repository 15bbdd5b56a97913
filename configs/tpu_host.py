"""One TPU host, one evening: gate v1_d1024 on open text.        python train.py configs/tpu_host.py

Hardware: TPU v6e, the 8 chips of one host (ct6e-standard-8t). Text as in gpu_h200.py. 6.6 B tokens, 2 hours at
20 % MFU [assumed; not timed]. Expected loss: unknown, nobody has run it. Run by us: no.
Sizes and recipe are gate v1_d1024.py's but for vocabulary and data."""
from configs.v1_d1024 import *

mixture = (("hf:HuggingFaceFW/fineweb-edu:sample-10BT:text", 1.0),)
tokenizer = "bpe:32768"
vocab_size = 32_768
topology = "v6e:2x4"
sample_tokens = 200

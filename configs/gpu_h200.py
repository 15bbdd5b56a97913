"""One GPU, half a day: 1.24 B parameters on FineWeb-Edu.                       python train.py configs/gpu_h200.py

Hardware: one H100 or H200. 6.6 B tokens take 12.5 hours at 146,000 tokens a second, 23 % MFU, and 48 of 80 GiB
[measured: four steps on an H100, `python tests/gpu.py --parts=e`]. Text comes from the Hugging Face hub on the
first start; a byte-pair vocabulary is trained on it. Expected loss: unknown, nobody has run it to the end.
Vocabulary and data are not those of the published gates. Run by us: four steps.
Sizes, batch and recipe are gate v1_d1024.py's."""
from configs.v1_d1024 import *
from configs import hopper            # kernels for an H100 or H200; other cards run plain XLA

mixture = (("hf:HuggingFaceFW/fineweb-edu:sample-10BT:text", 1.0),)
tokenizer = "bpe:32768"
vocab_size = 32_768

accumulate = 16                     # 8 rows at a time; 16 of them would fit as well [derived]
topology = "h100:1"                 # the smaller of the two
sample_tokens = 200

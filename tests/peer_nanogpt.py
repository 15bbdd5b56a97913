"""nanoGPT's CPU demonstration on our text: the figure that configs/smoke.py has to beat. Needs torch.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT && pip install torch
    python tests/peer_nanogpt.py ../nanoGPT --seconds=150

Writes our training text as nanoGPT's character-level data set, trains with the config and the flags that its
README gives for a laptop (4 layers, 4 heads, 128 wide, 64 characters, batch 12), once with its 2,000 steps
and once with as many steps as fit into --seconds (the learning-rate decay stretched alike), and scores the
whole held-out Shakespeare as train.py scores ours: in windows one after another, every character once."""
import argparse
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

LAPTOP = ("--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 "
          "--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0").split()


def write_dataset(repo):
    """nanoGPT/data/books_char: ids of characters as uint16, meta.pkl as its sample.py wants it."""
    texts = {"train": [], "shakespeare": []}
    for domain, text in data.documents("books", ROOT / "out/data"):
        texts.setdefault(domain or "train", []).append(text)
    train, held_out = ("\n".join(texts[k]) for k in ("train", "shakespeare"))
    letters = sorted(set(train + held_out))
    number = {ch: i for i, ch in enumerate(letters)}
    folder = repo / "data/books_char"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("train", train), ("val", held_out)):
        np.array([number[ch] for ch in text], np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": number}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return held_out


def train(repo, steps):
    start = time.time()
    subprocess.run([sys.executable, "train.py", "config/train_shakespeare_char.py", "--dataset=books_char",
                    "--out_dir=out-books-char", f"--max_iters={steps}", f"--lr_decay_iters={steps}",
                    f"--eval_interval={steps // 8}", "--always_save_checkpoint=True", *LAPTOP],
                   cwd=repo, check=True, stdout=subprocess.DEVNULL)
    return time.time() - start


@torch.no_grad()
def bits_per_byte(repo, held_out):
    sys.path.insert(0, str(repo))
    from model import GPT, GPTConfig
    saved = torch.load(repo / "out-books-char/ckpt.pt", map_location="cpu", weights_only=False)   # our own file
    network = GPT(GPTConfig(**saved["model_args"]))
    network.load_state_dict(saved["model"])
    network.eval()
    ids = torch.from_numpy(np.fromfile(repo / "data/books_char/val.bin", np.uint16).astype(np.int64))
    size, nats, scored = saved["model_args"]["block_size"], 0.0, 0
    for start in range(0, len(ids) - 1, size):
        window = ids[start:start + size + 1]
        _, loss = network(window[None, :-1], window[None, 1:])
        nats, scored = nats + loss.item() * (len(window) - 1), scored + len(window) - 1
    assert scored == len(ids) - 1
    return nats / math.log(2) / (len(held_out.encode()) - 1), saved["best_val_loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", type=Path)
    parser.add_argument("--seconds", type=float, default=150, help="wall-clock time of configs/smoke.py")
    options = parser.parse_args()
    held_out = write_dataset(options.repo.resolve())
    steps = 2000
    for _ in range(2):
        seconds = train(options.repo, steps)
        bpb, best = bits_per_byte(options.repo.resolve(), held_out)
        print(f"nanoGPT, {steps} steps, {seconds:.0f} s: held-out Shakespeare {bpb:.4f} bits per byte "
              f"(its own estimate {best:.4f} nats a character)", flush=True)
        steps = int(steps * options.seconds / seconds) // 8 * 8         # the last step is an evaluation, and saved

"""nanoGPT's CPU demonstration on our text: the figure that configs/smoke.py has to beat.

Needs torch.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT && pip install torch
    python tests/peer_nanogpt.py ../nanoGPT --seconds=150

Writes our training text as nanoGPT's character-level data set and trains with the config and the
flags that its README gives for a laptop (4 layers, 4 heads, 128 wide, 64 characters, batch 12):
once with its 2,000 steps, and once with as many steps as fit into --seconds (the learning-rate
decay stretched alike). Scores the whole held-out Shakespeare as train.py scores ours: in windows
one after another, every character once.

    python tests/peer_nanogpt.py ../nanoGPT --speed

Times instead one training step of the two at that laptop shape, in turns: nanoGPT's GPT with its
AdamW and its clip, as it comes and by torch.compile, and our model without experts, of as many
parameters, with our optimizer."""
import argparse
import contextlib
import math
import os
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

LAPTOP = ("--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 "
          "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0").split()


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
    flags = ["--dataset=books_char", "--out_dir=out-books-char", f"--max_iters={steps}",
             f"--lr_decay_iters={steps}", f"--eval_interval={steps // 8}",
             "--always_save_checkpoint=True", *LAPTOP]
    subprocess.run([sys.executable, "train.py", "config/train_shakespeare_char.py", *flags],
                   cwd=repo, check=True, stdout=subprocess.DEVNULL)
    return time.time() - start


@torch.no_grad()
def bits_per_byte(repo, held_out):
    sys.path.insert(0, str(repo))
    from model import GPT, GPTConfig
    saved = torch.load(repo / "out-books-char/ckpt.pt", map_location="cpu",
                       weights_only=False)                      # our own file
    network = GPT(GPTConfig(**saved["model_args"]))
    network.load_state_dict(saved["model"])
    network.eval()
    ids = np.fromfile(repo / "data/books_char/val.bin", np.uint16)
    ids = torch.from_numpy(ids.astype(np.int64))
    size, nats, scored = saved["model_args"]["block_size"], 0.0, 0
    for start in range(0, len(ids) - 1, size):
        window = ids[start:start + size + 1]
        _, loss = network(window[None, :-1], window[None, 1:])
        nats, scored = nats + loss.item() * (len(window) - 1), scored + len(window) - 1
    assert scored == len(ids) - 1
    return nats / math.log(2) / (len(held_out.encode()) - 1), saved["best_val_loss"]


def speed(repo, rounds, name):
    """With a name, be that runner of peer_torch.race; without one, let "ours", "nanoGPT" and
    "compiled", nanoGPT by torch.compile, take turns."""
    import jax

    import kernels
    import model
    import train as our
    from tests import peer_torch as peer
    kernels.keep_freed_memory()
    rows, S, V = 12, 64, 65
    cores = len(os.sched_getaffinity(0))
    c = model.ModelConfig(vocab_size=V, seq_len=S, hidden_dim=128, num_layers=4, num_heads=4,
                          num_kv_heads=4, head_dim=32, shared_dim=320, gated_norm_rank=16,
                          remat="none")
    # copies of the weights take 0.87 of the time of shares here [measured]
    t = our.TrainConfig(mixture=(("none", 1.0),), tokenizer="bytes", steps=10_000, batch_size=rows,
                        replicas=cores)
    _, _, batch = peer.problem(c, rows, 0, padding=False)
    if name == "ours":
        return peer.work(peer.our_step(c, t, batch))

    # our model.py is loaded, so nanoGPT's, of the same name, comes by its path
    import importlib.util
    spec = importlib.util.spec_from_file_location("nanogpt_model", repo / "model.py")
    nano = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nano)
    torch.set_num_threads(cores)
    network = nano.GPT(nano.GPTConfig(block_size=S, vocab_size=V, n_layer=4, n_head=4, n_embd=128,
                                      dropout=0.0, bias=False))
    optimizer = network.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    ids = peer.to_torch(batch)
    forward = torch.compile(network) if name == "compiled" else network

    def nano_step():                            # the loop of its train.py, one microbatch, on a CPU
        _, loss = forward(ids["tokens"], ids["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    if name:
        with contextlib.redirect_stdout(sys.stderr):
            nano_step()
        return peer.work(nano_step)
    nano_size = sum(w.numel() for w in network.parameters())
    sizes = {"ours": model.count(c).total, "nanoGPT": nano_size, "compiled": nano_size}
    program = [Path(__file__).resolve(), repo, "--speed"]
    commands = {name: [*program, f"--runner={name}"] for name in sizes}
    ms = {k: 1e3 * s for k, s in peer.race(commands, rounds, steps=10).items()}
    for name in ms:
        print(f"{name:8s} {sizes[name]:9,} parameters  {ms[name]:6.1f} ms a step  "
              f"{rows * S / ms[name]:5.1f} ktok/s")
    print(f"ours reaches {ms['nanoGPT'] / ms['ours']:.2f} x nanoGPT's tokens per second, "
          f"{ms['compiled'] / ms['ours']:.2f} x when that is compiled (best of {rounds} rounds of "
          f"10 steps, in turns, a process each; torch {torch.__version__}, jax {jax.__version__})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", type=Path)
    parser.add_argument("--seconds", type=float, default=150,
                        help="wall-clock time of configs/smoke.py")
    parser.add_argument("--speed", action="store_true",
                        help="time one step of both at nanoGPT's laptop shape")
    parser.add_argument("--rounds", type=int, default=12, help="of --speed")
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.repo / "train.py").is_file():
        parser.error(f"expected a checkout of nanoGPT, found no train.py in {options.repo}")
    if options.speed:
        sys.exit(speed(options.repo.resolve(), options.rounds, options.runner))
    held_out = write_dataset(options.repo.resolve())
    steps = 2000
    for _ in range(2):
        seconds = train(options.repo, steps)
        bpb, best = bits_per_byte(options.repo.resolve(), held_out)
        print(f"nanoGPT, {steps} steps, {seconds:.0f} s: held-out Shakespeare {bpb:.4f} bits per "
              f"byte (its own estimate {best:.4f} nats a character)", flush=True)
        # a multiple of 8: the last step is an evaluation, and saved
        steps = int(steps * options.seconds / seconds) // 8 * 8

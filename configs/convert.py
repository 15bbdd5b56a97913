"""Weights that move: out of a checkpoint for others to read, and from others into a new run.

Run:  python configs/convert.py SOURCE --to=DIR [--dtype=bfloat16]
SOURCE is a run directory (its newest checkpoint; RUN@STEP names another), a checkpoint directory,
also gs://BUCKET/PATH, or a directory of safetensors. DIR must be new. It gets model*.safetensors,
config.json and the tokenizer: in Marin's public schema ("grug_moe") if the model is of that family
and SOURCE is a checkpoint, else in a plain schema of our own. `train.py --init_from` reads a run, a
checkpoint and both schemas. Weights go through one layer at a time. Needs: pip install safetensors.
Read: the two schemas, what can be opened, how a run begins with it, what is written."""

import argparse
import contextlib
import dataclasses
import json
import math
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import ml_dtypes
import numpy as np

import data
import model
import train

DTYPES = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16)}
FILE_BYTES = 5 * 10**9                  # of one .safetensors file, as the public ones have it
TOKENIZER_FILES = "tokenizer.tiktoken", "tokenizer.tiktoken.json", "tokenizer.json"


# ------------------------------------------------------------------------------ the two schemas

# Our name of a weight and its public one. Matrices are stored [out, in], so all but the embedding
# are turned. [marin, lib/levanter/src/levanter/models/snowball.py, #7227]
PUBLIC = {
    "embed_VD": "model.embed_tokens.weight",
    "embed_norm_gain_D": "model.embed_norm.weight",
    "embed_norm_down_DU": "model.embed_gated_norm.down_proj.weight",
    "embed_norm_up_UD": "model.embed_gated_norm.up_proj.weight",
    "layers/attn_norm_gain_D": "model.layers.{}.input_layernorm.weight",
    "layers/attn_norm_down_DU": "model.layers.{}.attn_gated_norm.down_proj.weight",
    "layers/attn_norm_up_UD": "model.layers.{}.attn_gated_norm.up_proj.weight",
    "layers/query_DQ": "model.layers.{}.self_attn.q_proj.weight",
    "layers/key_DP": "model.layers.{}.self_attn.k_proj.weight",
    "layers/value_DP": "model.layers.{}.self_attn.v_proj.weight",
    "layers/out_QD": "model.layers.{}.self_attn.o_proj.weight",
    "layers/head_gate_DN": "model.layers.{}.self_attn.attn_gate.weight",
    "layers/mlp_norm_gain_D": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm_down_DU": "model.layers.{}.mlp_gated_norm.down_proj.weight",
    "layers/mlp_norm_up_UD": "model.layers.{}.mlp_gated_norm.up_proj.weight",
    "layers/router_DE": "model.layers.{}.mlp.router.weight",
    "bias_LE": "model.layers.{}.mlp.router.bias",
    "layers/gate_EDF": "model.layers.{}.mlp.experts.gate_proj.weight",
    "layers/up_EDF": "model.layers.{}.mlp.experts.up_proj.weight",
    "layers/down_EFD": "model.layers.{}.mlp.experts.down_proj.weight",
    "layers/shared_gate_DZ": "model.layers.{}.shared_expert.gate_proj.weight",
    "layers/shared_up_DZ": "model.layers.{}.shared_expert.up_proj.weight",
    "layers/shared_down_ZD": "model.layers.{}.shared_expert.down_proj.weight",
    "final_norm_gain_D": "model.norm.weight",
    "final_norm_down_DU": "model.final_gated_norm.down_proj.weight",
    "final_norm_up_UD": "model.final_gated_norm.up_proj.weight",
    "head_DV": "lm_head.weight",
}
# A public config.json has one spelling a field; these are ours, and the spellings to refuse.
FIELDS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "seq_len", "hidden_size": "hidden_dim",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "sliding_window": "window",
    "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_dim", "shared_expert_intermediate_size": "shared_dim",
    "rope_theta": "rope_theta", "qk_mult": "qk_scale"}
ALIASES = {
    "hidden_dim": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "attention_head_dim": "head_dim", "max_seq_len": "max_position_embeddings",
    "num_local_experts": "num_experts", "num_experts_per_token": "num_experts_per_tok",
    "intermediate_dim": "moe_intermediate_size", "intermediate_size": "moe_intermediate_size",
    "shared_expert_intermediate_dim": "shared_expert_intermediate_size",
    "layer_norm_eps": "rms_norm_eps", "initializer_std": "initializer_range"}
# What the public schema means without saying so, and what it says of every model.
FAMILY = dict(half_rope=True, nope_on_full=True, last_layer_full=True, partial_key_offset=False,
              combine_sum=2.5, gated_norm_rank=128)
CONSTANTS = {"model_type": "grug_moe", "grugmoe_artifact_schema_version": 1,
             "grugmoe_attention_mode": "production", "rms_norm_eps": 1e-5,
             "tie_word_embeddings": False}
OURS = "moe_weights_1"                  # "schema" of our own config.json


def is_public(c):
    """Whether the public schema has a name for this model."""
    return bool(c.shared_dim) and 0 < c.experts_per_token < c.num_experts and all(
        getattr(c, key) == value for key, value in FAMILY.items())


def public_config(c):
    """The config.json of the public schema."""
    own = dataclasses.asdict(c) | {"window": c.window or c.seq_len // 2}
    return {"architectures": ["GrugMoeForCausalLM"], **CONSTANTS,
            "initializer_range": 0.5 * c.hidden_dim**-0.5,
            **{name: own[ours] for name, ours in FIELDS.items()}}


def read_config(folder):
    """(ModelConfig, whether the schema is the public one) from a config.json. ConfigError."""
    path = Path(folder, "config.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("schema") == OURS:
            return model.ModelConfig(**found["model"]), False
        for name, value in CONSTANTS.items():
            if found.get(name, value if name != "model_type" else None) != value:
                train.refuse(path, f"{name} {value!r}", repr(found.get(name)))
        if aliases := sorted(ALIASES.keys() & found.keys()):
            train.refuse(path, f"the spelling '{ALIASES[aliases[0]]}'", f"'{aliases[0]}'")
        sizes = {ours: found[name] for name, ours in FIELDS.items()}
        return model.ModelConfig(**sizes, **FAMILY, router_z=0.0), True
    except train.ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        train.refuse(path, "the config of a model", train.one_line(error))


# ---------------------------------------------------------------------------- what can be opened

class Weights(NamedTuple):
    """Somebody's weights, read when asked for, one slice after another. read(path, layer, index) is the slice
    `index` of a weight of model.param_specs, or of "bias_LE"; layer is None where there is no stack, index is
    a slice for each axis or None."""
    config: model.ModelConfig
    read: Callable
    folder: Any                         # where tokenizer files may be
    step: int | None                    # of a checkpoint
    sums: dict | None                   # of a checkpoint: {name: train.checksum}

    @property
    def names(self):
        return entries(self.config)


def entries(c):
    """[(path, layer, shape)] of every weight in the order of writing, the balancing bias too."""
    top, layered = [], []
    def add(path, w):
        inside = path.startswith("layers/")
        (layered if inside else top).append((path, w.shape[1:] if inside else w.shape))
    model.map_params(add, c)
    if c.num_experts:
        layered.append(("bias_LE", (c.num_experts,)))
    return [(path, None, shape) for path, shape in top] + [
        (path, i, shape) for i in range(c.num_layers) for path, shape in layered]


def open_weights(source):
    """A run, a checkpoint directory or a directory of safetensors -> Weights. ConfigError names
    what is missing, left over, of another shape or type."""
    source, step = re.fullmatch(r"(.*?)(?:@(\d+))?", str(source), re.DOTALL).groups(default="")
    if "://" not in source:
        source = str(Path(source).expanduser().resolve())
        if list(Path(source).glob("*.safetensors")):
            return open_safetensors(Path(source))
    return open_checkpoint(source, step)


def checkpoint_folder(source):
    """Where the checkpoints of a run are; or the directory itself."""
    from etils import epath
    config, inside = Path(source, "config.json"), epath.Path(source) / "checkpoints"
    if "://" in source or inside.exists() or not config.is_file():
        return inside if inside.exists() else epath.Path(source)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if elsewhere := json.loads(config.read_text(encoding="utf-8"))["train"]["checkpoint_dir"]:
            return epath.Path(elsewhere)
    return epath.Path(source)


def open_checkpoint(source, step=""):
    """The newest committed checkpoint of a run or of a checkpoint directory, or that of a step."""
    import tensorstore
    from etils import epath
    folder = checkpoint_folder(source)
    found = sorted((int(path.name) for path in (folder.iterdir() if folder.exists() else ())
                    if re.fullmatch("[0-9]+", path.name)), reverse=True)
    if not found or step and step not in map(str, found):
        train.refuse(source, f"a checkpoint{' of step ' + step if step else ''}, or *.safetensors",
                     f"steps {found}" if found else "none")
    place = folder / str(int(step) if step else found[0])
    try:
        record = json.loads((place / "record" / "metadata").read_text())
        c, at, sums = model.ModelConfig(**record["config"]["model"]), record["step"], {**record["arrays"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        train.refuse(place, "a checkpoint with its record", train.one_line(error))
    base, opened = f"{place / 'state'}/", {}
    def read(path, layer, index=None):
        try:
            if path not in opened:
                spec = {"driver": "ocdbt", "path": leaf_name(path),
                        "base": base if "://" in base else f"file://{base}"}
                opened[path] = tensorstore.open({"driver": "zarr", "kvstore": spec}).result()
            stack = opened[path] if layer is None else opened[path][layer]
            return (stack[index] if index else stack).read().result()
        except Exception as error:              # whatever tensorstore raises about damage
            train.refuse(place, f"{path} as it was saved", train.one_line(error), "name an older step: PATH@STEP")
    return Weights(c, read, epath.Path(source), at, sums)


def leaf_name(path):
    """The name of a weight in a checkpoint, as train.leaves_by_name makes it."""
    if path == "bias_LE":
        return ".bias_LE"
    return ".params" + "".join(f"[{key!r}]" for key in path.split("/"))


def open_safetensors(folder):
    """A directory of safetensors of either schema. All names, shapes and types are checked here."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        train.refuse(folder, "the package safetensors", "none", "run: pip install safetensors")
    c, public = read_config(folder)
    files, where = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            files[path] = safe_open(path, framework="numpy")
            if twice := sorted(where.keys() & {*files[path].keys()}):
                train.refuse(path, f"{twice[0]} in one file", f"it in {where[twice[0]].name}, too",
                             "remove one export")
            where |= {name: path for name in files[path].keys()}
        except (SafetensorError, OSError) as error:
            train.refuse(path, "a whole .safetensors file", train.one_line(error), "fetch it again")
    index = folder / "model.safetensors.index.json"
    try:
        promised = {**json.loads(index.read_text())["weight_map"]} if index.exists() else where
    except (OSError, ValueError, KeyError, TypeError) as error:
        train.refuse(index, "a weight_map", train.one_line(error), "fetch it again")
    if gone := sorted({file for file in promised.values()} - {p.name for p in files} - set(files)):
        train.refuse(folder, f"the file {gone[0]} that {index.name} names", "none")
    def stored(path, layer, e=None):
        name = file_name(path, layer, public)
        return name if e is None else name.replace(".experts.", f".experts.{e}.")
    def tensor(name, shape, turn):
        """The slice of a tensor, which must be there with this shape and a type we know."""
        if name not in where:
            train.refuse(folder, f"a tensor {name}", "none")
        part, kinds = files[where[name]].get_slice(name), [kind for kind, _ in DTYPES.values()]
        want = [*shape[:-2], shape[-1], shape[-2]] if turn else [*shape]
        if part.get_shape() != want:
            train.refuse(f"{where[name]}: {name}", f"shape {want}", part.get_shape())
        if part.get_dtype() not in kinds:       # Marin's bfloat16 exports round the bias as well
            train.refuse(f"{where[name]}: {name}", " or ".join(kinds), part.get_dtype())
        return part
    parts, known = {}, set()
    for path, layer, shape in entries(c):
        turn, names = is_turned(path, shape, public), [stored(path, layer)]
        if names[0] not in where and len(shape) == 3:           # or a tensor for each expert
            names, shape = [stored(path, layer, e) for e in range(shape[0])], shape[1:]
        known |= {*names}
        parts[path, layer] = [tensor(name, shape, turn) for name in names], turn
    if left := sorted(where.keys() - known):
        train.refuse(folder, "no other tensors", f"{left[0]} and {len(left) - 1} more")
    def read(path, layer, index=None):
        some, turn = parts[path, layer]
        rank = len(some[0].get_shape()) + (len(some) > 1)
        index = index or (slice(None),) * rank
        if turn:
            index = (*index[:-2], index[-1], index[-2])
        if len(some) > 1:
            value = np.stack([one[index[1:]] for one in some[index[0]]])
        else:
            value = some[0][index]
        return (value.swapaxes(-1, -2) if turn else value).astype(np.float32)
    return Weights(c, read, folder, None, None)


def file_name(path, layer, public):
    """The name of a weight in a .safetensors file."""
    if public:
        return PUBLIC[path].format(layer)
    return path if layer is None else f"layers/{layer}/{path.removeprefix('layers/')}"


def is_turned(path, shape, public):
    """Whether the public schema stores a weight with its last two axes exchanged."""
    return public and len(shape) >= 2 and path != "embed_VD"


# ----------------------------------------------------------------------- how a run begins with it

def begin(c, t, mesh, tokenizer):
    """The State of a run that begins with the weights and the balancing bias of t.init_from: with
    a fresh optimizer at step 0, or, with keep_optimizer, as it was saved. ConfigError names what
    does not fit: a weight with both shapes, the tokenizer, a checkpoint that has been altered."""
    weights = open_weights(t.init_from)
    theirs = tokenizer_hash(weights.folder)
    if theirs != tokenizer.sha256 and theirs and t.init_tokenizer == "same":
        train.refuse("init_from", f"the tokenizer of {t.init_from}, {theirs[:12]}",
                     f"{tokenizer.name}, {tokenizer.sha256[:12]}",
                     f"set tokenizer={str(weights.folder)!r}, or --init_tokenizer=any")
    old, new = (dataclasses.asdict(config) for config in (weights.config, c))
    changed = {key: value for key, value in new.items() if value != old[key]}
    want, found = shapes(c), shapes(weights.config)
    for path in [*want, *found]:
        if want.get(path) != found.get(path):
            train.refuse(f"init_from: {path}", f"shape {want.get(path)}",
                         f"{found.get(path)} in {t.init_from}",
                         "it has " + ", ".join(f"{key}={old[key]!r}" for key in changed))
    state = (whole_state if t.keep_optimizer else with_weights)(c, t, mesh, weights)
    train.log(f"begins    with the weights of {t.init_from}"
              + (f", step {weights.step}" if weights.step is not None else "")
              + (", and its optimizer" if t.keep_optimizer else "")
              + ("" if theirs else "; it has no tokenizer to compare with")
              + "".join(f"; {key}: {old[key]!r} -> {value!r}" for key, value in changed.items()))
    return state


def with_weights(c, t, mesh, weights):
    """A fresh State with these weights and this bias in it, checked against their checksums."""
    state = train.first_state(c, dataclasses.replace(t, init_from=""), mesh, None)
    likes = {"bias_LE": state.bias_LE}
    jax.tree.map(likes.__setitem__, model.map_params(lambda path, _: path, c), state.params)
    def place(path):
        def part(index):
            if path != "bias_LE" and not path.startswith("layers/"):
                return weights.read(path, None, index)
            return np.stack([weights.read(path, i, index[1:])
                             for i in range(c.num_layers)[index[0]]])
        return jax.make_array_from_callback(likes[path].shape, likes[path].sharding, part)
    new = {path: place(path) for path in shapes(c)}
    if weights.sums:
        sums = np.asarray(train.checksums([*new.values()])[0]).tolist()
        for path, found in zip(new, sums):
            if found != weights.sums.get(leaf_name(path)):
                train.refuse(f"init_from: {path}", f"what {t.init_from} saved in step "
                             f"{weights.step}", "other bytes", "name an older step: PATH@STEP")
    return state._replace(params=model.map_params(lambda path, _: new[path], c),
                          bias_LE=new.get("bias_LE", state.bias_LE))


def whole_state(c, t, mesh, weights):
    """The State of a checkpoint with its moments and its step."""
    if weights.step is None or weights.step >= t.steps:
        train.refuse("keep_optimizer", f"a checkpoint of a step below steps={t.steps}",
                     f"{t.init_from}, " + ("safetensors" if weights.step is None else
                                           f"step {weights.step}"))
    folder = str(checkpoint_folder(str(weights.folder)))
    checkpoints = train.Checkpoints(dataclasses.replace(t, checkpoint_dir=folder))
    target = train.abstract_state(c, t, mesh)
    leaves, why = checkpoints.read(weights.step, train.leaves_by_name(target))
    if why:
        train.refuse("init_from", "a sound checkpoint of this optimizer", why)
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def shapes(c):
    """{path: shape} of every weight and of the bias."""
    found = {"bias_LE": (c.num_layers, c.num_experts)} if c.num_experts else {}
    model.map_params(lambda path, w: found.__setitem__(path, w.shape), c)
    return found


def tokenizer_name(folder):
    """What data.load_tokenizer takes for a run or a converted directory; None if it has none."""
    if Path(folder, "tokenizer.tiktoken").is_file():
        return str(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        return "bytes" if config.get("train", config)["tokenizer"] == "bytes" else None


def tokenizer_hash(folder):
    """The hash of the tokenizer that stands in a run or in a converted directory, or None."""
    name = tokenizer_name(folder)
    return name and data.load_tokenizer(name).sha256


# ------------------------------------------------------------------------------- what is written

def bytes_of(dtype, shape):
    """How many a tensor takes in a file."""
    return math.prod(shape) * np.dtype(DTYPES[dtype][1]).itemsize


def write_safetensors(path, tensors):
    """One .safetensors file from [(name, dtype, shape, make)]; make() is called when its turn
    comes. The header needs only shapes, so no more than one tensor is held at a time."""
    header, end = {}, 0
    for name, dtype, shape, _ in tensors:
        size = bytes_of(dtype, shape)
        header[name] = {"dtype": DTYPES[dtype][0], "shape": [*shape], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dtype, shape, make in tensors:
            value = np.ascontiguousarray(make(), DTYPES[dtype][1])
            assert value.shape == tuple(shape)
            file.write(value.reshape(-1).view(np.uint8))


def files_of(tensors):
    """The tensors in lists of at most FILE_BYTES, or of one that is larger."""
    files, room = [], 0
    for tensor in tensors:
        size = bytes_of(*tensor[1:3])
        if size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(tensor)
        room -= size
    return files


def convert(source, out, dtype="float32"):
    """Write the weights of `source` into the new directory `out`. Returns what it printed."""
    out = Path(out).expanduser()
    if out.exists():
        train.refuse(out, "a new directory", "one that exists", "choose another --to")
    weights = open_weights(source)
    c, public, sums = weights.config, weights.step is not None and is_public(weights.config), {}
    def make(path, layer, shape):
        def run():
            value = weights.read(path, layer)
            if weights.sums:
                first = (layer or 0) * math.prod(shape)
                mark = int(train.checksum(jax.numpy.asarray(value), first))
                sums[path] = (sums.get(path, 0) + mark) % 2**32
            return value.swapaxes(-1, -2) if is_turned(path, shape, public) else value
        return run
    def tensor(path, layer, shape):
        stored = (*shape[:-2], shape[-1], shape[-2]) if is_turned(path, shape, public) else shape
        return (file_name(path, layer, public), "float32" if path == "bias_LE" else dtype, stored,
                make(path, layer, shape))
    files = files_of([tensor(*entry) for entry in weights.names])
    with data.atomic_directory(out) as scratch:
        where = {}
        for i, tensors in enumerate(files, 1):
            name = (f"model-{i:05d}-of-{len(files):05d}" if len(files) > 1 else "model")
            write_safetensors(scratch / f"{name}.safetensors", tensors)
            where |= {tensor[0]: f"{name}.safetensors" for tensor in tensors}
        for path in sums:
            if sums[path] != weights.sums.get(leaf_name(path)):
                train.refuse(source, f"{path} as it was saved", "other bytes", "use another step")
        if len(files) > 1:
            size = sum(bytes_of(*tensor[1:3]) for tensors in files for tensor in tensors)
            index = {"metadata": {"total_size": size}, "weight_map": where}
            train.write(scratch / "model.safetensors.index.json", json.dumps(index, indent=1))
        for name in TOKENIZER_FILES:
            if Path(weights.folder, name).is_file():
                shutil.copy(Path(weights.folder, name), scratch)
        if (scratch / "tokenizer.json").exists():       # transformers asks for this beside it
            train.write(scratch / "tokenizer_config.json",
                        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        said = public_config(c) if public else {"schema": OURS, "model": dataclasses.asdict(c)}
        said["dtype"] = dtype
        if tokenizer_name(weights.folder) == "bytes":
            said["tokenizer"] = "bytes"
        train.write(scratch / "config.json", json.dumps(said, indent=1))
    kind = "the public schema" if public else "our own schema"
    print(f"{out}: {model.count(c).total:,} weights, {len(where)} tensors, {len(files)} files of "
          f"{dtype}, in {kind}")


def main(words):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--to", required=True, help="a new directory")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(words)
    try:
        convert(options.source, options.to, options.dtype)
    except (train.ConfigError, data.DataError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

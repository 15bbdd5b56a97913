"""Where the mesh lies on a TPU's torus, how long traffic takes there, and the search for the best mesh.

Run:  python train.py CONFIG --plan --search[=N] [--compile] [--key=value ...]     the ten best; compile the best N
      python configs/layout.py RUN_DIR ...                       what buffers would drop, by the loads of a run
A slice of TPUs is a grid of two or three sides whose rows may close to rings. A mesh axis takes a factor of each
side: `factors` below is {axis: (x, y, z)}, whose product over axes is the shape of the slice. "expert" comes
innermost, so that a block of neighbors shares experts; then "data", then "replica".
Read: place, link_load and gather_links (one side of a slice), network, search."""

import dataclasses
import functools
import itertools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train


# ------------------------------------------------------------------------------------------------- places

def default_block(shape, n):
    """The block of n chips that jax's mesh_utils gives to "expert": the most whole sides whose product is n, or else
    as much of each side as divides it, in order. So it is for all meshes that were compared but one: it gives 64 of
    v6e:8x16 a block of 4x16, not 8x8 [compared: jax 0.10.2 with the devices of libtpu 0.0.42]."""
    for k in range(len(shape), -1, -1):
        for chosen in itertools.combinations(range(len(shape)), k):
            if math.prod(shape[i] for i in chosen) == n:
                return tuple(side if i in chosen else 1 for i, side in enumerate(shape))
    block = []
    for side in shape:
        block.append(math.gcd(side, n))
        n //= block[-1]
    return tuple(block)


def place(word, shape, mesh):
    """{axis: factors} in a slice of `shape`, with a block such as "2x2x2" for "expert". mesh: {axis: length} in it.

    "replica" gets the outer places of the first sides. ConfigError if the block does not fit."""
    parts = word.split("x") if word else map(str, default_block(shape, mesh["expert"]))
    block = tuple(int(part) if part.isdigit() else 0 for part in parts)
    block += (1,) * (len(shape) - len(block))
    if len(block) != len(shape) or math.prod(block) != mesh["expert"] or any(
            side % n for side, n in zip(shape, block)):
        train.refuse("expert_block", f"expert_parallel={mesh['expert']} chips, whose sides divide those of "
                     f"{'x'.join(map(str, shape))}", repr(word or "x".join(map(str, block))))
    left, copies, outer = [side // n for side, n in zip(shape, block)], mesh["replica"], []
    for side in left:
        outer.append(math.gcd(side, copies))
        copies //= outer[-1]
    if copies > 1:
        train.refuse("replicas", f"a number that divides along the sides {left}", mesh["replica"])
    data = tuple(side // n for side, n in zip(left, outer))
    return {"replica": tuple(outer), "data": data, "expert": block}


def torus_grid(word, mesh, devices):
    """The devices of TPU slices as an array replica x data x expert, where the block `word` shares experts."""
    slices, grids = {}, []
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    for members in slices.values():
        if not hasattr(members[0], "coords"):
            train.refuse("expert_block", "a TPU, whose chips have coordinates", members[0].device_kind)
        coords = np.array([device.coords for device in members])
        coords -= coords.min(0)
        shape = tuple((coords.max(0) + 1).tolist())
        if math.prod(shape) != len(members):
            train.refuse("expert_block", "one device a chip of a whole slice", f"{len(members)} in {shape}")
        torus = np.empty(shape, object)
        for device, at in zip(members, coords):
            torus[tuple(at)] = device
        inside = dict(zip(train.MESH, (mesh[0] // len(slices), *mesh[1:])))
        factors = place(word, shape, inside)
        sides = [factors[axis][i] for i in range(len(shape)) for axis in train.MESH]
        order = [3 * i + k for k in range(3) for i in range(len(shape))]
        grids.append(torus.reshape(sides).transpose(order).reshape(tuple(inside.values())))
    return np.concatenate(grids)


# ------------------------------------------------------------------------------------- the time of traffic

def closes(name, shape):
    """Whether the rows of each side are rings: on v4 and v5p in slices of whole 4x4x4 cubes, on v5e and v6e along
    sides of 16 [cited: "How to scale your model", and Google's pages of these chips]."""
    cubes = len(shape) == 3 and all(side % 4 == 0 for side in shape)
    return tuple(cubes if len(shape) == 3 else side == 16 for side in shape)


@functools.cache
def link_load(side, ring, factor, stride):
    """Bytes on the fullest link, in one direction, of an all-to-all along one side of a slice.

    Every chip sends one byte, in equal parts to the `factor` chips of its group, itself included, which lie
    `stride` apart. All groups do so at once, each part by the shorter way, or half by either way if both are
    equal. The result is n / 8 for a ring of n and n / 4 for a line of n neighbors."""
    load = np.zeros((side, 2))                              # of the link from a chip upwards, downwards
    for source in range(side):
        first = source - source // stride % factor * stride
        for target in range(first, first + factor * stride, stride):
            up, down = (target - source) % side, (source - target) % side
            if not ring:
                up, down = (up, side) if target > source else (side, down)
            ways = [(0, up)] if up < down else [(1, down)] if down < up else [(0, up), (1, down)]
            for way, steps in ways:
                for k in range(steps):
                    load[(source + (-k if way else k)) % side, way] += 1 / factor / len(ways)
    return float(load.max())


def gather_links(side, ring, factor, stride):
    """How many links bring bytes to every chip at full rate while groups gather along one side of a slice.

    Two in a ring, one at the ends of a line. `stride` groups lie between each other and share the links."""
    if factor == 1:
        return 0.0
    whole = ring and side > 2 and factor * stride == side
    return (2 if whole else 1) / stride


# How libtpu 0.0.42 compiles gathers and reduce-scatters over a part of the mesh, whatever the block: "1DAllGather" and
# "StrategyRing{colors:1}" in the program; sums over all chips are "StrategyND{colors:3}" [read: tests/hlo.py]. One
# direction of one link a chip [assumed], shared by as many groups as lie between each other
ONE_RING = "gathers along one ring"


class Rate(NamedTuple):
    """Of one mesh axis. An all-gather and a reduce-scatter use all sides of the slice along which the axis lies at
    once; in an all-to-all every byte passes them one after the other, so its fullest link counts."""
    gather: float           # bytes a second that a chip receives
    all_to_all: float       # seconds for every byte that a chip receives
    ring: float             # as gather, along one ring of single links through all of the group: see ONE_RING


def network(name, chip, slices, shape, size, word=""):
    """{mesh axis: Rate} of a mesh on slices of TPUs, or on the GPUs of one node, where all pairs are linked."""
    if not name.startswith("v"):
        return {axis: Rate(chip.link, 1 / chip.link, chip.link) for axis in train.MESH}
    factors = place(word, shape, size | {"replica": size["replica"] // slices})
    rates, rings, stride = {}, closes(name, shape), [1] * len(shape)
    for axis in reversed(train.MESH):
        sides = list(zip(shape, rings, factors[axis], stride))
        links = sum(gather_links(*side) for side in sides)
        kept = 1 - 1 / max(2, size[axis])                   # of the bytes sent, those that arrive at others
        apart = -max((factor, -step) for (_, _, factor, step) in sides)[1]       # along the side of most hops
        rates[axis] = Rate(chip.link * (links or 1), max(link_load(*side) for side in sides) / kept / chip.link,
                           chip.link / apart)
        stride = [s * f for s, f in zip(stride, factors[axis])]
    return rates | ({"replica": Rate(chip.outside, 1 / chip.outside, chip.outside)} if slices > 1 else {})


def seconds(received, rates, ring=False):
    """{mesh axis: seconds} of traffic {(axis, what): bytes}, one after the other; ring: as ONE_RING says."""
    spent = {}
    for (axis, what), amount in received.items():
        rate = rates[axis]
        spent[axis] = spent.get(axis, 0.0) + (
            amount * rate.all_to_all if "ragged" in what else amount / (rate.ring if ring else rate.gather))
    return spent


def collective_seconds(x, rates, ring=False):
    """Of a hlo.Collective, whose axis may be several: sums over all chips use all links."""
    names = [axis for axis in x.axis.split("+") if axis in rates]
    if x.op == "ragged-all-to-all":
        return x.received * rates["expert"].all_to_all
    if len(names) == 1:
        return x.received / (rates[names[0]].ring if ring else rates[names[0]].gather)
    return x.received / sum(rates[axis].gather for axis in names) if names else 0.0


# ------------------------------------------------------------------------------------------- the search

MOST_DROPPED = 0.01     # of the assignments, expected, if the config itself does not drop more [assumed]


class Candidate(NamedTuple):
    step: float             # seconds, nothing overlapped
    mfu: float
    ring: float             # MFU, nothing overlapped, gathers as ONE_RING says
    memory: float           # bytes of a chip: state, gradients, layer inputs and the layers at work, estimated
    dropped: float          # expected share of the assignments
    keys: dict              # what differs from the config


def blocks(shape, experts):
    """Every block of a slice whose number of chips divides the experts, as tuples of sides."""
    divisors = [[n for n in range(1, side + 1) if side % n == 0] for side in shape]
    return [block for block in itertools.product(*divisors) if max(1, experts) % math.prod(block) == 0]


def working(c, tokens, shards):
    """Bytes of the layers at work for so many tokens of a chip, beside weights and layer inputs: rows of hidden_dim
    in the compute type a token, 10 of them for each of its choices [fitted to seven programs of the 129B, 67B, 32B
    and 1.2B models that libtpu 0.0.42 compiled; these lie within 40 % of it]."""
    rows = 10 * c.experts_per_token + (35 if shards == 1 else 90 if c.exchange == "ragged" else 135)
    return rows * tokens * c.hidden_dim * (2 if c.compute_dtype == "bfloat16" else 4)


def estimate(c, t, machine):
    """A Candidate without its keys, by arithmetic on the weight table. machine: (slices, name, shape)."""
    from configs import plan
    slices, name, shape = machine
    chip, chips = plan.CHIPS[name], slices * math.prod(shape)
    size, held = train.mesh_shape(t, chips), 0
    muon, width = plan.muon_groups(t), 2 if c.compute_dtype == "bfloat16" else 4
    for (kind, _, split, _), elements in plan.weight_classes(c).items():
        moments = 1 if muon and kind == "experts" else 2
        copies = 2 + moments + (t.accumulate > 1)
        held += 4 * copies * elements / math.prod(size[axis] for axis in split)
    tokens = t.batch_size * c.seq_len // t.accumulate // chips
    kept = plan.states_kept(c)
    layers = 1 if kept else c.num_layers
    memory = held + kept * c.num_layers * tokens * c.hidden_dim * width + layers * working(c, tokens, size["expert"])
    ideal, products = plan.product_seconds(c, t, machine)
    rates = network(name, chip, slices, shape, size, t.expert_block)
    received = plan.traffic(c, t, size)
    step = products + sum(seconds(received, rates).values())
    ringed = products + sum(seconds(received, rates, ring=True).values())
    return Candidate(step, ideal / step, ideal / ringed, memory, expected_drop(c, size["expert"], tokens), {})


def variants(c, t, machine):
    """(ModelConfig, TrainConfig, keys) of every layout that the mesh and the batch allow."""
    slices, name, shape = machine
    chips = slices * math.prod(shape)
    capacities = sorted({c.capacity_factor or 1.0, 1.0, 1.25})
    models = []
    for remat, over, (exchange, capacity) in itertools.product(
            ("block", "attended", "none"), ("data", "expert+data"),
            [(how, x) for how in ("ring", "ragged") for x in capacities] if c.num_experts else [("ring", 0.0)]):
        keys = dict(remat=remat, weights_over=over, exchange=exchange, capacity_factor=capacity)
        models.append((dataclasses.replace(c, **keys), keys))
    fitting = {}
    for block, copies, accumulate in itertools.product(blocks(shape, c.num_experts), (1, 2, 4, 8, 16),
                                                       (1, 2, 4, 8, 16, 32)):
        keys = dict(expert_parallel=math.prod(block), replicas=copies, accumulate=accumulate,
                    expert_block="x".join(map(str, block)) if name.startswith("v") else "")
        if t.batch_size % (accumulate * chips) or copies % slices or chips % (copies * keys["expert_parallel"]):
            continue
        layout = dataclasses.replace(t, **keys)
        size = train.mesh_shape(layout, chips)
        for model_config, model_keys in models:
            alone = model_keys["weights_over"], model_keys["exchange"], model_keys["capacity_factor"]
            if size["expert"] == 1 and alone != ("data", "ring", capacities[0] if c.num_experts else 0.0):
                continue                                        # nothing is exchanged
            key = tuple(size.values()), model_keys["weights_over"]
            if key not in fitting:
                fitting[key] = not train.mesh_error(model_config, dataclasses.replace(layout, accumulate=1), chips)
            if fitting[key]:
                yield model_config, layout, model_keys | keys


def search(c, t, machine, most=0.85):
    """Candidates by bound, best first: those that are estimated to fill at most so much of the memory, do not drop
    more than the config is expected to, and are not equal to a better one but for the order of the sides."""
    from configs import plan
    limit, found, seen = most * plan.CHIPS[machine[1]].memory, [], set()
    tokens = t.batch_size * c.seq_len // t.accumulate // (machine[0] * math.prod(machine[2]))
    allowed = max(MOST_DROPPED, expected_drop(c, t.expert_parallel, tokens))
    for model_config, layout, keys in variants(c, t, machine):
        try:
            one = estimate(model_config, layout, machine)
        except train.ConfigError:                   # replicas that do not divide along the sides
            continue
        if one.memory <= limit and one.dropped <= allowed:
            found.append(one._replace(keys=keys))
    found.sort(key=lambda one: (one.step, one.memory))
    best = []
    for one in found:
        mark = round(one.step, 6), round(one.memory), round(one.dropped, 6)
        if mark not in seen:
            best.append(one)
        seen.add(mark)
    return best


# The spread of an expert's load over that of independent choices, which is 1 / sqrt(its assignments): 2.1, 2.1 and
# 3.3 in smoke.py, a smoke.py of 64 experts and laptop.py [measured: configs/README.md]. Longer documents: not measured
CLUMPING = 3.0


def expected_drop(c, shards, tokens):
    """The share of assignments that buffers are expected to drop, if `shards` devices share the experts and have so
    many tokens each: loads of experts are taken as independent and normal, balanced in the mean. 0 on one device."""
    if not c.num_experts or shards == 1 or not c.capacity_factor:
        return 0.0
    spread = CLUMPING / math.sqrt(tokens * c.experts_per_token)      # a shard has so many assignments in the mean
    over = (c.capacity_factor - 1) / spread
    density = math.exp(-over * over / 2) / math.sqrt(2 * math.pi)
    return spread * (density - over * math.erfc(over / math.sqrt(2)) / 2)


def words(keys):
    """Keys of a candidate as they stand on a command line."""
    return " ".join(f"--{key}={value:g}" if isinstance(value, float) else f"--{key}={value}"
                    for key, value in keys.items())


def row(name, one, memory):
    return (f"{name:>5s} {100 * one.mfu:6.1f} % {one.step:8.2f} s {100 * one.ring:8.1f} % {one.memory / 2**30:7.1f} "
            f"of {memory / 2**30:.0f} GiB {100 * one.dropped:6.2f} %   {words(one.keys)}")


def show_search(c, t, count, compile_too=False):
    """--plan --search=N: print the ten best layouts by bound, or N if that is more; with --compile, send the best N
    to the compiler and print what it says of them. The exit code."""
    from configs import plan
    plan.jax.config.update("jax_platforms", "cpu")
    began, machine = time.monotonic(), plan.parse_topology(t)
    memory = plan.CHIPS[machine[1]].memory
    best = search(c, t, machine)
    print(f"search    {len(best):,} layouts of {t.topology} fill at most 85 % of the memory, by arithmetic, in "
          f"{time.monotonic() - began:.0f} s.")
    print(f"          Nothing overlaps in the bounds; in 'one ring' {ONE_RING}, as libtpu 0.0.42 lays them")
    if not best:
        print("verdict   nothing fits; try more chips")
        return 1
    print(f"{'':5s} {'MFU':>8s} {'a step':>10s} {'one ring':>10s} {'memory of a chip':>20s} {'dropped':>8s}   keys")
    try:
        plan.plan(c, t)
        print(row("now", estimate(c, t, machine), memory))
    except train.ConfigError as error:
        print(f"now       {error}")
    best = [one._replace(keys=changed(one.keys, c, t)) for one in best[:max(10, count)]]
    for number, one in enumerate(best, 1):
        print(row(str(number), one, memory), flush=True)
    return compile_best(c, t, best[:count], memory) if compile_too else 0


def changed(keys, c, t):
    return {key: value for key, value in keys.items() if value != getattr(c, key, getattr(t, key, None))}


def compile_best(c, t, best, memory):
    """Compile each layout and print a table of them: memory and bounds by arithmetic and of the compiled program."""
    from configs import plan
    lines, code = [], 0
    for number, one in enumerate(best, 1):
        print(f"\nlayout {number}: {words(one.keys)}", flush=True)
        of_model = {key: value for key, value in one.keys.items() if hasattr(c, key)}
        of_run = {key: value for key, value in one.keys.items() if hasattr(t, key)}
        failed, facts = plan.compile_layout(dataclasses.replace(c, **of_model), dataclasses.replace(t, **of_run))
        code |= failed
        said = "does not fit"
        if facts:
            shares = ", ".join(f"{100 * mfu:.1f} % {how}" for how, mfu in facts["mfu"].items())
            said = (f"{facts['memory'] / 2**30:5.1f} GiB ({100 * facts['memory'] / memory:.0f} %), executes "
                    f"{facts['executed']:.2f} x, MFU {shares}")
        lines.append(f"{number:5d} planned {100 * one.mfu:.1f} %, {one.memory / 2**30:.1f} GiB; compiled {said}")
    print("\ncompiled  " + f"for {t.topology}\n" + "\n".join(lines))
    return code


# --------------------------------------------------------------------------------- what balance costs

CAPACITIES = (1.0, 1.05, 1.1, 1.15, 1.25, 1.5)


def show_drops(runs, after=0.5):
    """Print which share of the assignments buffers of 1, 2, 4, 8 experts would drop at each capacity, by the loads in
    the last part of each run's metrics.jsonl (one batch a line), and the spread of an expert's load, in its means."""
    print(f"{'run':24s} {'experts':>7s} {'a shard':>8s} {'spread':>7s}   dropped at "
          + "".join(f"{factor:8g}" for factor in CAPACITIES))
    for run in runs:
        rows = [row for row in train.read_rows(f"{run}/metrics.jsonl") if row.get("load_LE")]
        if not rows:
            train.refuse(run, "a run directory whose metrics.jsonl has loads of experts", "none")
        load = np.array([row["load_LE"] for row in rows[int(after * len(rows)):]])       # [batches, L, E]
        for n in (1, 2, 4, 8):
            if load.shape[2] % n or load.shape[2] == n:
                continue
            shard = load.reshape(*load.shape[:2], -1, n).mean(-1)
            drops = [np.maximum(0, shard - factor).mean() for factor in CAPACITIES]
            print(f"{run[-24:]:24s} {load.shape[2]:7d} {n:8d} {shard.std():7.3f}              "
                  + "".join(f"{100 * drop:6.2f} %" for drop in drops))
    return 0


if __name__ == "__main__":
    import argparse
    import scaling
    parser = argparse.ArgumentParser(description="the share of assignments that buffers would drop, by a run's loads")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    sys.exit(scaling.guarded("layout.py", lambda: show_drops(parser.parse_args().runs), train.ConfigError))

"""Where the mesh lies on a TPU's torus, how long traffic takes there, and the search for the best mesh.

Run:  python train.py CONFIG --plan --search[=N] [--compile] [--key=value ...]     the ten best; compile the best N
A slice of TPUs is a grid of two or three sides whose rows may close to rings. A mesh axis takes a factor of each
side: `factors` below is {axis: (x, y, z)}, whose product over axes is the shape of the slice. "expert" comes
innermost, so that a block of neighbors shares experts; then "data", then "replica".
Read: place, link_load and gather_links (one side of a slice), network, search."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

import train


# ------------------------------------------------------------------------------------------------- places

def default_block(shape, n):
    """The block of n chips that jax's mesh_utils gives to "expert": the fewest whole sides whose product is n,
    or else as much of each side as divides it, in order [compared with libtpu 0.0.42's devices: test_plan]."""
    for k in range(len(shape) + 1):
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
    `stride` apart; all groups at once, each part by the shorter way, or half by either way if both are equal.
    n / 8 in a ring of n, n / 4 in a line of n neighbors."""
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


class Rate(NamedTuple):
    """Of one mesh axis. An all-gather and a reduce-scatter use all sides of the slice along which the axis lies at
    once; in an all-to-all every byte passes them one after the other, so its fullest link counts."""
    gather: float           # bytes a second that a chip receives
    all_to_all: float       # seconds for every byte that a chip receives


def network(name, chip, slices, shape, size, word=""):
    """{mesh axis: Rate} of a mesh on slices of TPUs, or on the GPUs of one node, where all pairs are linked."""
    if not name.startswith("v"):
        return {axis: Rate(chip.link, 1 / chip.link) for axis in train.MESH}
    factors = place(word, shape, size | {"replica": size["replica"] // slices})
    rates, rings, stride = {}, closes(name, shape), [1] * len(shape)
    for axis in reversed(train.MESH):
        sides = list(zip(shape, rings, factors[axis], stride))
        links = sum(gather_links(*side) for side in sides)
        kept = 1 - 1 / max(2, size[axis])                   # of the bytes sent, those that arrive at others
        rates[axis] = Rate(chip.link * (links or 1), max(link_load(*side) for side in sides) / kept / chip.link)
        stride = [s * f for s, f in zip(stride, factors[axis])]
    return rates | ({"replica": Rate(chip.outside, 1 / chip.outside)} if slices > 1 else {})


def seconds(received, rates):
    """{mesh axis: seconds} of traffic {(axis, what): bytes}, one after the other."""
    spent = {}
    for (axis, what), amount in received.items():
        rate = rates[axis]
        spent[axis] = spent.get(axis, 0.0) + (
            amount * rate.all_to_all if "ragged" in what else amount / rate.gather)
    return spent

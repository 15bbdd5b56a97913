"""Reads a compiled program: its collectives, the traffic they cause, and the FLOPs that it executes.

Run:  python tests/hlo.py CONFIG [--key=value ...]      compile the train step for the config's topology and report
It needs libtpu (pip install "jax[tpu]") and no TPU. `train.py CONFIG --plan --compile` prints the same report.
Read: decode and Program (the serialized program), replica_groups, collectives, Timeline (what the schedule hides),
unexpected, report; then the FLOPs.

The program is read from its protocol buffer (HloModuleProto), which every version of XLA can write. Its field
numbers are part of XLA's interface and never change their meaning; its printed text changes from release to
release. What has a form that is not known here is listed as unreadable and not judged."""

import collections
import itertools
import math
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

MESH = ("replica", "data", "expert")        # train.MESH

# Field numbers of xla/service/hlo.proto and xla/xla_data.proto [read from the descriptors in libtpu 0.0.48]
MODULE_COMPUTATIONS, MODULE_ENTRY, MODULE_SCHEDULE, MODULE_DEVICES = 3, 6, 7, 15
COMPUTATION_INSTRUCTIONS, COMPUTATION_ID = 2, 5
OPCODE, SHAPE, METADATA, LITERAL, CALLED, BACKEND_CONFIG, ATTRIBUTES = 2, 3, 7, 8, 38, 43, 68
CONVOLUTION, DOT, ID, OPERANDS = 16, 30, 35, 36
GROUPS, PAIRS, DEVICE_LIST, IOTA_GROUPS, MESH_AXES = 49, 52, 87, 92, 93
SHAPE_TYPE, SHAPE_DIMENSIONS, SHAPE_TUPLE = 2, 3, 4
OP_NAME = 2
INTEGERS = (4, 5, 6, 7)                     # of a literal: s32s, s64s, u32s, u64s

# Bytes of an element by xla.PrimitiveType; a token and an opaque value have none
WIDTH = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 14: 0, 15: 8, 16: 2, 17: 0,
         18: 16, 19: 1, 20: 1, 21: 0.5, 22: 0.5, 23: 1, 24: 1, 25: 1}

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
               "ragged-all-to-all", "send")
UNREADABLE = "unreadable"


# --------------------------------------------------------------------------------------------- the protocol buffer

def varint(blob, at):
    """The number that begins at a place, and the place behind it."""
    value = shift = 0
    while True:
        byte = blob[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def decode(blob):
    """A message as {field number: [values]}. A value is an int, or the bytes of a string, message or packed list."""
    fields, at = defaultdict(list), 0
    while at < len(blob):
        key, at = varint(blob, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(blob, at)
            fields[number].append(value)
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"expected a protocol buffer, found wire type {kind}")
        length = 8 if kind == 1 else 4
        if kind == 2:
            length, at = varint(blob, at)
        fields[number].append(blob[at:at + length])
        at += length
    return fields


def integers(values):
    """The numbers of a repeated field, whether packed or not."""
    numbers = []
    for value in values:
        if isinstance(value, int):
            numbers.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = varint(value, at)
            numbers.append(number)
    return numbers


def one(fields, number, default=b""):
    return fields[number][-1] if number in fields else default


class Program(NamedTuple):
    computations: dict          # {id: [instruction, ...]}, each as decode gives it
    entry: int                  # id of the computation with which the program begins
    devices: int                # partitions of the program; 0 if it does not say
    schedule: dict              # {id of a computation: [ids of its instructions in the order in which they run]}


def read_program(blob):
    module = decode(blob)
    computations = {}
    for body in map(decode, module[MODULE_COMPUTATIONS]):
        computations[one(body, COMPUTATION_ID, 0)] = [decode(i) for i in body[COMPUTATION_INSTRUCTIONS]]
    assignment = decode(one(module, MODULE_DEVICES))
    sequences = [decode(entry) for entry in decode(one(module, MODULE_SCHEDULE))[1]]
    schedule = {one(entry, 1, 0): integers(decode(one(entry, 2))[1]) for entry in sequences}
    return Program(computations, one(module, MODULE_ENTRY, 0), one(assignment, 2, 0), schedule)


def serialized(compiled):
    """The HloModuleProto of a jax.stages.Compiled."""
    return compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()


# ------------------------------------------------------------------------------------------------ the collectives

class Collective(NamedTuple):
    op: str             # "all-gather", ...
    axis: str           # mesh axes of its groups, such as "data" or "replica+data"; "" if no axes make these
    #                     groups; UNREADABLE if its groups, types or number of runs cannot be read
    times: int          # how often a step runs it: the product of the loops around it
    received: float     # bytes that a chip receives each time; if unreadable: bytes of its largest array
    arrays: int         # how many at once: the compiler joins small ones
    scope: str          # where in the program it comes from
    wrong: str = ""     # why it is unexpected


def array_sizes(shape):
    """Bytes of every array in a shape, or None where the element type is unknown."""
    fields = decode(shape)
    if SHAPE_TUPLE in fields:
        return [size for part in fields[SHAPE_TUPLE] for size in array_sizes(part)]
    width = WIDTH.get(one(fields, SHAPE_TYPE, 0))
    if width == 0:
        return []
    return [None if width is None else width * math.prod(integers(fields[SHAPE_DIMENSIONS]))]


def iota(dims, permutation):
    """Devices 0, 1, ... in an array of shape dims, its axes permuted."""
    grid = np.arange(math.prod(dims)).reshape(dims)
    return grid.transpose(permutation) if permutation else grid


def replica_groups(instruction):
    """The groups of devices of a collective, [[device, ...], ...], in any of the four ways to write them.

    None if it has none or writes them in a way that is not known here."""
    explicit = instruction[GROUPS]
    if DEVICE_LIST in instruction:
        explicit = decode(one(instruction, DEVICE_LIST))[1]
    if explicit:
        return [integers(decode(group)[1]) for group in explicit]
    if IOTA_GROUPS in instruction:
        fields = decode(one(instruction, IOTA_GROUPS))
        grid = iota(integers(fields[3]), integers(fields[4]))
        return grid.reshape(one(fields, 1, 1), one(fields, 2, 1)).tolist()
    if MESH_AXES in instruction:
        return mesh_groups(decode(one(instruction, MESH_AXES)))
    return None


def mesh_groups(fields):
    """Groups given as axes of a mesh: a group holds the devices that differ along these axes only."""
    mesh = decode(one(fields, 1))
    shape = [one(decode(axis), 2, 1) for axis in mesh[1]]
    if 2 in mesh:
        grid = np.array(integers(mesh[2]))
    elif 3 in mesh:
        transform = decode(one(mesh, 3))
        grid = iota(integers(transform[1]), integers(transform[2]))
    else:
        grid = np.arange(math.prod(shape))
    references = [decode(reference) for reference in fields[2]]
    if grid.size != math.prod(shape) or any(2 in reference for reference in references):
        return None                                         # a part of an axis: not known here
    chosen = [one(reference, 1, 0) for reference in references]
    grid = np.moveaxis(grid.reshape(shape), chosen, range(-len(chosen), 0))
    return grid.reshape(-1, math.prod(shape[i] for i in chosen)).tolist()


def mesh_axes(shape):
    """{groups of devices, as a frozenset of frozensets: names of the mesh axes that make them}, fewest first."""
    ids, named = np.arange(math.prod(shape)).reshape(shape), {}
    for count in (1, 2, 3):
        for axes in itertools.combinations(range(3), count):
            size = math.prod(shape[i] for i in axes)
            groups = np.moveaxis(ids, axes, range(-count, 0)).reshape(-1, size)
            name = "+".join(MESH[i] for i in axes if shape[i] > 1)
            named.setdefault(frozenset(map(frozenset, groups.tolist())), name)
    return named


def axis_of(instruction, named, devices):
    """(mesh axes of a collective, devices in a group)."""
    if PAIRS in instruction:
        pairs = [decode(pair) for pair in instruction[PAIRS]]
        pairs = [{one(pair, 1, 0), one(pair, 2, 0)} for pair in pairs]
        fitting = [(len(next(iter(groups))), axis) for groups, axis in named.items()
                   if all(any(pair <= group for group in groups) for pair in pairs)]
        return (min(fitting)[1], 2) if fitting else (UNREADABLE, 2)
    groups = replica_groups(instruction)
    if groups is None or sorted(itertools.chain(*groups)) != list(range(devices)):
        return UNREADABLE, devices
    return named.get(frozenset(map(frozenset, groups)), ""), len(groups[0])


def trip_count(condition):
    """How often a loop runs: a counter ends it, and its limit is the largest constant of the condition."""
    literals = [decode(one(i, LITERAL)) for i in condition if LITERAL in i]
    found = [n for literal in literals for kind in INTEGERS for n in integers(literal[kind]) if n < 2**31]
    return max(found, default=None)


def runs_of(program):
    """(how often a step runs each computation, computations in loops of unknown length, fused reduce-scatters)."""
    times, uncertain, scatters = defaultdict(int), set(), set()

    def visit(computation, factor, certain):
        times[computation] += factor
        if not certain:
            uncertain.add(computation)
        for instruction in program.computations[computation]:
            called = integers(instruction[CALLED])
            if one(instruction, OPCODE) == b"while":
                body, condition = called
                count = trip_count(program.computations[condition])
                visit(body, factor * (1 if count is None else count), certain and count is not None)
                continue
            if b"AllReduceScatterFusion" in one(instruction, BACKEND_CONFIG):
                scatters.update(called)
            for other in called:
                visit(other, factor, certain)

    visit(program.entry, 1, True)
    return times, uncertain, scatters


def collectives(blob, size):
    """Every collective of a compiled program, with the loops in which it stands. size: {mesh axis: length}.

    A program for several slices is that of one of them: its groups name the devices of one slice, and what it sums
    over slices goes through the hosts, as a `send` for "megascale" instead of an all-reduce. A reduce-scatter of
    shares that do not fill tiles is written as a fusion of pad, all-reduce and slice, and run as a reduce-scatter
    of padded shares: by the same emitter, AllReduceScatterFusion, as the others."""
    read, found = Reader(read_program(blob), size), []
    for computation, runs in read.times.items():
        for instruction in read.program.computations[computation]:
            if x := read.collective(computation, instruction):
                found.append(x._replace(times=runs))
    return found


class Reader:
    """What has to be known of a program to read one of its instructions. size: {mesh axis: length}."""

    def __init__(self, program, size):
        self.program = program
        self.slices = math.prod(size.values()) // program.devices if program.devices else 1
        self.shape = size["replica"] // self.slices, size["data"], size["expert"]
        self.named = mesh_axes(self.shape)
        self.times, self.uncertain, self.scatters = runs_of(program)

    def collective(self, computation, instruction):
        """The Collective that an instruction is, as if it ran once, or None."""
        opcode = one(instruction, OPCODE).decode()
        op = opcode.removesuffix("-start")
        if op not in COLLECTIVES or op == "send" and not any(b"megascale" in x for x in instruction[ATTRIBUTES]):
            return None
        devices = math.prod(self.shape)
        axis, n = axis_of(instruction, self.named, devices) if op != "send" else ("replica", self.slices)
        sizes = array_sizes(one(instruction, SHAPE))
        known = [bytes_ for bytes_ in sizes if bytes_ is not None]
        whole = op == "send" or opcode != op                    # the result holds the operands too
        amount = max(known, default=0) if whole else sum(known)
        if computation in self.uncertain or len(known) < len(sizes):
            axis = UNREADABLE
        if op == "send":
            op = "all-reduce"
        if op == "all-reduce" and computation in self.scatters:
            op, amount = "reduce-scatter", amount / n
        scale = {"reduce-scatter": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        received = max(known, default=0) if axis == UNREADABLE else amount * scale.get(op, (n - 1) / n)
        scope = one(decode(one(instruction, METADATA)), OP_NAME).decode()
        return Collective(op, axis, 1, received, len(sizes), scope)


# ------------------------------------------------------------------------------------------------ the schedule

def elements(shape):
    return math.prod(integers(decode(shape)[SHAPE_DIMENSIONS]))


def product_flops(instruction, shapes):
    """FLOPs of a dot, a convolution (what a TPU makes of dots) or a kernel that says its own; 0 of all else."""
    opcode, operands = one(instruction, OPCODE), integers(instruction[OPERANDS])
    if opcode == b"custom-call":
        found = re.search(rb'"flops":\s*"?(\d+)', one(instruction, BACKEND_CONFIG))
        return int(found[1]) if found else 0
    if opcode == b"dot":
        dims = integers(decode(shapes[operands[0]])[SHAPE_DIMENSIONS])
        contracted = integers(decode(one(instruction, DOT))[1])
        return 2 * elements(one(instruction, SHAPE)) * math.prod(dims[i] for i in contracted)
    if opcode == b"convolution":
        numbers, dims = decode(one(instruction, CONVOLUTION)), integers(decode(shapes[operands[1]])[SHAPE_DIMENSIONS])
        return 2 * elements(one(instruction, SHAPE)) * math.prod(dims) // dims[one(numbers, 4, 0)]
    return 0


class Timeline:
    """How long a program takes if its instructions run in the order of its schedule: products at `rate` FLOPs a
    second, a collective for seconds_of(Collective) on the links of its mesh axes, one after the other on an axis. An
    asynchronous one runs between its start and its done; whatever stands between them goes on meanwhile.

    total: all seconds; computed: seconds of products."""

    def __init__(self, blob, size, seconds_of, rate):
        self.read = Reader(read_program(blob), size)
        self.seconds_of, self.rate = seconds_of, rate
        self.cost = {}
        self.computed = 0.0
        self.total = self.run(self.read.program.entry)

    def flops(self, computation):
        """Of a computation that is called once, such as that of a fusion."""
        if computation not in self.cost:
            body = self.read.program.computations[computation]
            shapes = {one(i, ID, 0): one(i, SHAPE) for i in body}
            self.cost[computation] = sum(
                product_flops(i, shapes) + sum(map(self.flops, integers(i[CALLED]))) for i in body)
        return self.cost[computation]

    def inside(self, computation):
        """The collectives of a computation and of those that it calls."""
        found = []
        for i in self.read.program.computations[computation]:
            x = self.read.collective(computation, i)
            found += [x] if x else []
            for other in integers(i[CALLED]):
                found += self.inside(other)
        return found

    def run(self, computation):
        """Seconds of a computation, from an idle network to an idle network."""
        program, now, free, ends = self.read.program, 0.0, collections.Counter(), {}
        body = {one(i, ID, 0): i for i in program.computations[computation]}
        shapes, before = {k: one(i, SHAPE) for k, i in body.items()}, 0.0
        for k in program.schedule.get(computation) or list(body):
            i, opcode = body[k], one(body[k], OPCODE).decode()
            called, own = integers(i[CALLED]), self.read.collective(computation, i)
            if opcode == "while":
                count = trip_count(program.computations[called[1]]) or 1
                before = self.computed
                now = max([now, *free.values()]) + count * self.run(called[0])
                self.computed = before + count * (self.computed - before)
                continue
            if opcode == "conditional":
                now += max(self.run(branch) for branch in called)
                continue
            if opcode.endswith("-done"):
                now = max(now, ends.get(integers(i[OPERANDS])[0], now))
                continue
            if opcode.endswith("-update"):
                ends[k] = ends.get(integers(i[OPERANDS])[0], now)
                continue
            moved = ([own] if own else []) + [x for other in called for x in self.inside(other)]
            end = now
            for x in moved if opcode != "call" else []:
                axes = x.axis.split("+")
                done = max([now, *(free[axis] for axis in axes)]) + self.seconds_of(x)
                for axis in axes:
                    free[axis] = done
                end = max(end, done)
            if opcode.endswith("-start"):
                ends[k] = end
                continue
            if opcode == "call":
                now += sum(map(self.run, called))
                continue
            spent = (product_flops(i, shapes) + sum(map(self.flops, called))) / self.rate
            self.computed += spent
            now = max(now + spent, end) if moved else now + spent
        return max([now, *free.values()])


SUMMED = "all-reduce where a reduce-scatter was asked for"
ASKED = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "psum": "all-reduce",
         "ragged_all_to_all": "ragged-all-to-all"}              # {operation of jax: of XLA}
LAYER_LOOP = {("all-gather", "data"), ("reduce-scatter", "data"), ("all-gather", "expert"),
              ("reduce-scatter", "expert"), ("ragged-all-to-all", "expert")}


def unexpected(found):
    """The readable collectives of a MiB and more that no line of the program asks for, with `wrong` filled in.

    The layer loop holds gathers and gradient sums of weights over "data" and the exchange over "expert"; after it
    come the psums of gradients of copies. Outside of shard_map only norms are summed (bytes), and MuonH deals whole
    matrices out. A padded reduce-scatter names no line, nor do the permutes that move its shares into place, nor
    the all-reduce that the compiler makes of some: SUMMED. Psums of gradients that it joins with norms may bear
    the name of a norm.
    For several slices the compiler takes sums over slices and axes apart and drops the names of all that is
    outside of loops: there the layer loop, SUMMED, and the bytes in all can be judged, and no more."""
    sliced = any(x.axis == "replica" and x.op == "all-reduce" and not x.scope for x in found)

    def why(x):
        asked = [op for line, op in ASKED.items() if x.scope.rpartition("/")[2].startswith(line)]
        if x.op == "all-reduce" and not x.scope and x.axis in ("data", "expert"):
            return SUMMED
        if x.op == "collective-permute" and not x.scope:
            return ""                                   # moves the shares of a padded reduce-scatter into place
        if x.times > 1:
            return "" if (x.op, x.axis) in LAYER_LOOP else "not of the layer loop"
        if x.op == "reduce-scatter" and not x.scope:
            return ""
        if "shard_map" in x.scope:
            return "" if asked == [x.op] else "not what its line asks for"
        joined = x.arrays > 1 and x.op == "all-reduce" and x.scope.endswith("reduce_sum")
        fine = joined or "orthogonalize" in x.scope or sliced and not x.scope
        return "" if fine else "no line asks for it"

    large = [x for x in found if x.received >= 2**20 and x.axis != UNREADABLE]
    return [x._replace(wrong=why(x)) for x in large if why(x)]


def tally(found, key):
    """[(key, runs a step, bytes a step)] of collectives, those with most bytes first."""
    sums = defaultdict(lambda: (0, 0.0))
    for x in found:
        runs, amount = sums[key(x)]
        sums[key(x)] = runs + x.times, amount + x.times * x.received
    return sorted(((k, *both) for k, both in sums.items()), key=lambda row: -row[2])


def report(found, planned):
    """Print the table of collectives and those that are unexpected. Returns (whether all is well, that in words).

    planned: bytes a step by plan.traffic. Well is also a tenth of the bytes in all-reduces that the compiler put
    for reduce-scatters. With anything unreadable, nothing is well."""
    read = [x for x in found if x.axis != UNREADABLE]
    print(f"traffic   {'axis':24s} {'operation':20s} where {'runs a step':>12s} {'GB received a chip':>19s}")
    for (axis, op, loop), runs, amount in tally(read, lambda x: (x.axis, x.op, x.times > 1)):
        where = "loop" if loop else "once"
        print(f"          {axis or 'other':24s} {op:20s} {where} {runs:13,} {amount / 1e9:19.3f}")
    total, strange = sum(x.times * x.received for x in read), unexpected(read)
    print(f"          together {total / 1e9:.1f} GB; --plan says {planned / 1e9:.1f}")
    for (why, op, axis, scope), runs, amount in tally(strange, lambda x: (x.wrong, x.op, x.axis, x.scope[-60:])):
        print(f"unexpected {op} over {axis or 'other'}, {runs} a step, {amount / 1e9:.1f} GB, {why} {scope}")
    if len(read) < len(found):
        hidden = [x for x in found if x.axis == UNREADABLE]
        amount = sum(x.times * x.received for x in hidden)
        return False, (f"{len(hidden)} of {len(found)} collectives ({amount / 1e9:.1f} GB of arrays) are "
                       f"unreadable: this version of XLA writes what tests/hlo.py does not know")
    if not strange:
        return True, "every collective is where it should be"
    share = sum(x.times * x.received for x in strange) / total
    return (share < 0.1 and all(x.wrong == SUMMED for x in strange),
            f"{100 * share:.1f} % of the bytes move in collectives that nobody asked for")


# ------------------------------------------------------------------------------------------------ executed FLOPs

def traced_flops(jaxpr, devices=1):
    """Matmul FLOPs of a traced program on one device: loops times their length, the costlier branch of a cond,
    kernels by `kernel_flops`. XLA's cost analysis counts a loop body once, whatever its length."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            ((contracted, _), _), lhs = eqn.params["dimension_numbers"], eqn.invars[0].aval
            inner_product = math.prod(lhs.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner_product / devices
        elif name == "pallas_call":
            total += kernel_flops(eqn) / devices
        elif name == "cond":
            total += max(traced_flops(inner, devices) for inner in inner_jaxprs(eqn))
        else:
            times = eqn.params.get("length", 1) if name == "scan" else 1
            inside = 1 if name == "shard_map" else devices
            total += times * sum(traced_flops(inner, inside) for inner in inner_jaxprs(eqn))
    return total


def inner_jaxprs(eqn):
    values = itertools.chain(*(v if isinstance(v, (tuple, list)) else (v,) for v in eqn.params.values()))
    opened = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in opened if hasattr(value, "eqns")]


def kernel_flops(eqn):
    """Of one Pallas call: its own estimate (our kernels: every tile of the buffer, in use or not), or, for splash
    attention, which gives none, the products of its body times the grid steps that do not skip.

    A causal mask with or without a window is a band of blocks: row i of n sees min(i + 1, width) of them, where
    the grid is `width` wide; so does column i from the end, for the kernel of dk and dv."""
    if estimate := eqn.params.get("cost_estimate"):
        return estimate.flops
    grid, name = eqn.params["grid_mapping"].grid, eqn.params["name"] or ""
    steps = math.prod(grid)
    if name.startswith("splash"):
        n, width = grid[-3 if "dkv" in name else -2], grid[-1]
        steps = steps // (n * width) * sum(min(i + 1, width) for i in range(n))
    return steps * traced_flops(eqn.params["jaxpr"])


# ------------------------------------------------------------------------------------------------ the report

ADVICE = "Try more chips, a larger --accumulate or --remat=block"
GIB = 2**30


def compile_and_report(traced, mesh, memory, planned):
    """Compile a traced step for a mesh of chips with so many bytes of memory. Print memory, traffic and verdict.

    Returns (the exit code: 0 if it fits and every collective is expected, else 1; bytes of memory that it uses; the
    program), without memory and program if the compiler finds that it does not fit."""
    import jax
    began, lowered = time.time(), traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = (re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))             # or without the state:
                 or re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G", str(error)))
        if not found:
            raise
        excess = float(found[1]) - float(found[2])
        print(f"verdict   does not fit: {found[1]} GiB of {found[2]} a chip, {excess:.1f} too much. {ADVICE}")
        return 1, None, None
    m = compiled.memory_analysis()
    used = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    share = used / memory
    print(f"compiled  in {time.time() - began:.0f} s for {mesh.size:,} x {mesh.devices.flat[0].device_kind}, "
          f"jax {jax.__version__}")
    print(f"memory    {used / GIB:.2f} GiB of {memory / GIB:.0f} a chip, {100 * share:.0f} %: "
          f"state {m.argument_size_in_bytes / GIB:.2f}, temporary {m.temp_size_in_bytes / GIB:.2f}")
    blob = serialized(compiled)
    expected, words = report(collectives(blob, dict(mesh.shape)), planned)
    fit = "fits" if share < 0.85 else f"fits, but above 85 %. {ADVICE}"
    if share > 1:
        fit = f"does not fit: {(used - memory) / GIB:.1f} GiB too much. {ADVICE}"
    print(f"verdict   {fit}; {words}")
    return 0 if expected and share < 0.85 else 1, used, blob


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train
    from configs import plan
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        code, _ = plan.compile_layout(*train.load_config(sys.argv[1], sys.argv[2:]))
    except train.ConfigError as error:
        print(f"hlo.py: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)

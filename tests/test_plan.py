"""The plan: arithmetic against the published run, the network's model, and what is read of a compiled program."""
import dataclasses
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as Spec
from jaxlib import _hlo

import kernels
import model
import moe
import train
from tests import hlo
from configs import layout
from configs import plan
from configs import report

ROOT = Path(__file__).resolve().parent.parent


def numbers(name, *overrides):
    return plan.plan(*train.load_config(ROOT / f"configs/{name}.py", overrides))


def test_the_129b_plan_says_what_is_published():
    """Counts, tokens and steps of the job summary (#4697), and the arithmetic that its issue quotes."""
    p = numbers("moe_129b_as_run")
    assert f"{p['count'].total / 1e9:.2f} {p['count'].active / 1e9:.2f}" == "129.18 15.94"
    assert p["count"].flops_per_token == pytest.approx(3 * 3.3022e10, rel=1e-4)
    assert f"{p['tokens']:.5e}" == "1.00942e+12" and p["mesh"] == {"replica": 1, "data": 128, "expert": 8}
    # 194,443 tokens a second on 512 chips of 275 TFLOP/s were reported as 14.23 % MFU
    assert p["count"].mfu_flops * 194_443 / 512 / 275e12 == pytest.approx(0.1423, abs=2e-4)
    assert p["ideal"] == pytest.approx(p["count"].mfu_flops * 2048 * 4096 / 1024 / 275e12)


def test_the_129b_state_per_chip_is_its_weights_over_their_axes():
    """Experts (120.80 B) over data x expert, all else but the small over data: float32, two moments."""
    p = numbers("moe_129b_as_run")
    experts, small = 48 * 64 * 3 * 5120 * 2560, 48 * (5120 * (64 + 40 + 2)) + 2 * 5120
    want = 4 * (experts / 1024 + (p["count"].total - experts - small) / 128 + small)
    assert p["memory"]["weights"] == want and p["memory"]["moments"] == pytest.approx(2 * want, abs=100)
    assert sum(p["memory"].values()) < 0.5 * 32 * 2**30, "state and layer inputs leave room for a layer at work"


def test_the_roofline_of_the_129b_run_allows_40_percent():
    """Even if nothing overlaps, on v4; and ragged moves less than ring at 8 devices, more at 2."""
    p = numbers("moe_129b_as_run")
    assert p["mfu"]["one after the other"] > 0.40
    by = {(how, P): numbers("moe_129b_as_run", f"--exchange={how}", f"--expert_parallel={P}")["received"]
          ["expert", f"tokens, by {how}"] for how in moe.EXCHANGES for P in (2, 8)}
    assert by["ragged", 8] < by["ring", 8] and by["ragged", 2] > by["ring", 2]
    # ring at 8: five passes (gathered forward and again, its transpose; two scatters) of 7 x 8,192 tokens
    assert by["ring", 8] == 5 * 48 * 7 * 8192 * 5120 * 2


def test_the_129b_config_has_the_layout_that_the_search_found_and_the_published_one_a_name():
    """The same model and training, another use of the pod: one expert a chip, no copies over expert."""
    ours, theirs = numbers("moe_129b"), numbers("moe_129b_as_run")
    assert ours["mesh"] == {"replica": 1, "data": 16, "expert": 64} and ours["mfu"]["one after the other"] > 0.50
    assert theirs["mfu"]["one after the other"] < 0.46 and ours["count"] == theirs["count"]
    where = {"expert_parallel", "weights_over", "remat"}
    for mine, his in zip(*(train.load_config(ROOT / f"configs/{name}.py") for name in ("moe_129b", "moe_129b_as_run"))):
        mine, his = vars(mine), vars(his)
        assert {key for key in mine if mine[key] != his[key]} <= where | {"run_dir"}


def test_the_gpu_config_is_a_real_moe_and_its_state_leaves_room_on_80_gb(capsys):
    p = numbers("gpu_h200", "--topology=h100:1")
    assert 1e9 < p["count"].total < 2e9 and p["chips"] == 1
    # float32: weight, two moments, the sum of gradients and one microbatch's
    assert sum(p["memory"].values()) == pytest.approx(20 * p["count"].total, rel=0.05)
    assert train.main([str(ROOT / "configs/gpu_h200.py"), "--plan"]) == 0
    assert f"{sum(p['memory'].values()) / 2**30:.2f} of 75 GiB a chip" in capsys.readouterr().out


def test_a_plan_that_cannot_fit_says_by_how_much_and_what_to_change(capsys):
    for topology, words in (("v6e:8x8", "too much. Try more chips"), ("v5p:4x4x8", "verdict   state and layer inputs fit")):
        assert train.main([str(ROOT / "configs/moe_129b.py"), "--plan", f"--topology={topology}"]) == 0
        assert words in capsys.readouterr().out


def rates(name, shape, size, block=""):
    return layout.network(name, plan.CHIPS[name], 1, shape, dict(zip(train.MESH, size)), block)


def test_axis_rates_follow_the_torus():
    """Links that a gather uses, times their rate: two of a ring, one of a line, shared where groups alternate."""
    v4, v6e = plan.CHIPS["v4"].link, plan.CHIPS["v6e"].link
    one = rates("v4", (8, 8, 16), (1, 128, 8))
    assert one["expert"].gather == 2 * v4 and one["data"].gather == 4 * v4, "8 of 8x8x16: a side, as jax lays it"
    cube = rates("v4", (8, 8, 16), (1, 128, 8), "2x2x2")
    assert cube["expert"].gather == 3 * v4 and cube["data"].gather == 3 * v4
    line = rates("v6e", (16, 16), (1, 32, 8))
    assert line["expert"].gather == v6e and line["data"].gather == pytest.approx(2.25 * v6e), "8 of a ring of 16"
    assert layout.closes("v6e", (8, 16)) == (False, True) and layout.closes("v4", (2, 2, 4)) == (False,) * 3
    assert rates("h100", (8,), (1, 8, 1))["data"] == (450e9, 1 / 450e9, 450e9)
    assert one["data"].ring == v4 and cube["data"].ring == v4 / 2, "two groups share what one ring passes"
    outside = layout.network("v4", plan.CHIPS["v4"], 2, (8, 8, 8), {"replica": 2, "data": 64, "expert": 8})
    assert outside["replica"].gather == plan.CHIPS["v4"].outside


def test_64_chips_as_a_square_of_rings_exchange_like_a_ring_of_8_and_a_cube_of_8_like_half_of_one():
    v4 = plan.CHIPS["v4"].link
    sent = lambda n, block: rates("v4", (8, 8, 16), (1, 1024 // n, n), block)["expert"].all_to_all * (1 - 1 / n) * v4
    assert sent(8, "8x1x1") == sent(64, "8x8x1") == pytest.approx(1) and sent(16, "1x1x16") == pytest.approx(2)
    assert sent(8, "2x2x2") == sent(4, "2x2x1") == pytest.approx(0.5) and sent(4, "4x1x1") == pytest.approx(1)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_an_all_to_all_loads_the_links_of_a_ring_and_of_a_line_by_the_closed_forms(n):
    """n / 8 of what a chip sends in a ring with links both ways, n / 4 at the middle of a line."""
    assert layout.link_load(n, False, n, 1) == pytest.approx(n / 4)
    if n > 2:
        assert layout.link_load(n, True, n, 1) == pytest.approx(n / 8)
        assert layout.link_load(4 * n, True, n, 1) == pytest.approx(n / 4), "part of a ring is a line"


def loads(shape, rings, groups):
    """Bytes on every link {(chip, side, way): bytes} if each chip sends a byte, in equal parts, to its group: routes
    pass the sides in order, each by the shorter way, and half by either if both are equal."""
    load = {}

    def route(at, target, side, amount):
        while side < len(shape) and at[side] == target[side]:
            side += 1
        if side == len(shape):
            return
        n = shape[side]
        up = (target[side] - at[side]) % n
        ways = {1: up, -1: n - up} if rings[side] else {np.sign(target[side] - at[side]): 0}
        ways = [way for way, steps in ways.items() if steps == min(ways.values())]
        for way in ways:
            place = list(at)
            while place[side] != target[side]:
                key = tuple(place), side, int(way)
                load[key] = load.get(key, 0.0) + amount / len(ways)
                place[side] = (place[side] + way) % n
            route(tuple(place), target, side + 1, amount / len(ways))
    for group in groups:
        for source in group:
            for target in group:
                route(source, target, 0, 1 / len(group))
    return load


@pytest.mark.parametrize("name, shape, size, block", [
    ("v4", (4, 4, 4), (1, 1, 64), "4x4x4"), ("v4", (4, 4, 8), (1, 16, 8), "2x2x2"), ("v6e", (4, 8), (1, 4, 8), "4x2"),
    ("v6e", (2, 16), (1, 2, 16), "1x16"), ("v4", (4, 4, 8), (2, 8, 8), "1x1x8"),
    ("v5p", (4, 4, 4), (4, 4, 4), "2x2x1")])
def test_the_time_of_an_all_to_all_is_that_of_the_fullest_link_of_a_simulation(name, shape, size, block):
    """For experts and for "data" and "replica", whose groups lie between each other. The grid is what trains."""
    chips = [types.SimpleNamespace(coords=place, device_kind=name) for place in np.ndindex(*shape)]
    grid = layout.torus_grid(block, size, chips)
    got = rates(name, shape, size, block)
    for i, axis in enumerate(train.MESH):
        groups = np.moveaxis(grid, i, -1).reshape(-1, size[i])
        load = loads(shape, layout.closes(name, shape), [[chip.coords for chip in group] for group in groups])
        want = max(load.values(), default=0.0) / (1 - 1 / max(2, size[i]))
        assert got[axis].all_to_all * plan.CHIPS[name].link == pytest.approx(want)
        # each chip's byte to all others: no schedule of a gather is faster than its fullest chip can receive
        assert got[axis].gather <= 2 * len(shape) * plan.CHIPS[name].link


@pytest.mark.parametrize("side, ring, factor, stride", [
    (8, True, 8, 1), (8, False, 8, 1), (8, True, 2, 1), (8, True, 4, 2), (16, True, 4, 4), (16, True, 4, 1),
    (2, False, 2, 1)])
def test_gathers_along_a_side_load_its_links_as_planned(side, ring, factor, stride):
    """Every chip's share passes from member to member, half of it either way round a ring, whole along a line."""
    load, whole = np.zeros((side, 2)), ring and factor * stride == side
    for source in range(side):
        place = source // stride % factor
        for way, sign in enumerate((1, -1)):
            hops = (factor - 1) * stride if whole else (factor - 1 - place if sign > 0 else place) * stride
            for k in range(hops):
                load[(source + sign * k) % side, way] += (0.5 if whole else 1) / factor
    assert load.max() == pytest.approx((1 - 1 / factor) / layout.gather_links(side, ring, factor, stride))


@pytest.mark.parametrize("word, words", [
    ("3x3x1", "expected expert_parallel=64 chips, whose sides divide those of 8x8x16"),
    ("2x2", "found '2x2'"), ("axb", "found 'axb'"), ("8x1x1x1", "found '8x1x1x1'")])
def test_a_block_that_does_not_fit_is_one_line(capsys, word, words):
    assert train.main([str(ROOT / "configs/moe_129b.py"), "--plan", f"--expert_block={word}"]) == 2
    error = capsys.readouterr().err
    assert "expert_block: " in error and words in error and error.count("\n") == 1


def test_the_search_prints_the_ten_best_within_memory(capsys):
    """The 129B model with 8 of its experts on 64 chips: no layout of the ten is slower than jax's own."""
    arguments = [str(ROOT / "configs/moe_129b.py"), "--plan", "--search", "--topology=v5p:4x4x4", "--num_experts=8",
                 "--batch_size=128", "--remat=block", "--weights_over=data", "--expert_parallel=8", "--expert_block="]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^ +\d+ +([\d.]+) % +[\d.]+ s +([\d.]+) % +([\d.]+) of 95 GiB", out, re.M)
    assert len(rows) == 10 and "--expert_block=" in out
    shares = [float(mfu) for mfu, _, _ in rows]
    assert shares == sorted(shares, reverse=True) and all(float(ring) <= float(mfu) for mfu, ring, _ in rows)
    assert all(float(memory) < 0.85 * 95 for *_, memory in rows)
    now = re.search(r"^ +now +([\d.]+) %", out, re.M)
    assert float(now[1]) < shares[0]


@pytest.mark.parametrize("overrides, words", [
    (["--topology=v9:8x8"], "topology: expected one such as"),
    (["--topology=v4:0x8x8"], "topology: expected one such as"),
    (["--topology=0xv4:8x8x8"], "topology: expected one such as"),
    (["--topology=v4-2047"], "topology: expected v4-N with N = 8, 16, 32, 64 or a multiple of 128"),
    (["--topology=2xv5p:8x8x8"], "replicas: expected a multiple of the 2 slices, found 1"),
    (["--topology=4xv4:4x8x8", "--replicas=2"], "replicas: expected a multiple of the 4 slices, found 2"),
    (["--topology=h100:16"], "topology: expected h100:1 to h100:8, the GPUs of one node"),
    (["--topology=2xh100:8"], "networks between GPU nodes are not modeled"),
    (["--seq_len=1000"], "seq_len on a TPU: expected a multiple of 128, found 1000"),
    (["--topology=v4:8x8x12"], "batch_size / accumulate: expected a multiple of the 768 devices, found 2048"),
    (["--expert_parallel=128", "--batch_size=2048"], "expected axes that divide over the mesh, found 64 over 128"),
    (["--replicas=3"], "devices: expected a multiple of replicas x expert_parallel = 192"),
    (["--exchange=teleport"], "exchange: expected 'ring' or 'ragged'"),
    (["--capacity_factor=0"], "capacity_factor: expected a positive number, since exchange='ragged'"),
    (["--topology=h200:1024"], "topology: expected h200:1 to h200:8, the GPUs of one node"),
    (["--topology=h200:1", "--expert_parallel=1", "--compile"], "expected a TPU to compile for"),
])
def test_bad_plans_are_one_line(capsys, overrides, words):
    assert train.main([str(ROOT / "configs/moe_129b.py"), "--plan", *overrides]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_best_of_a_search_are_compiled_and_tabled(capsys, monkeypatch):
    """With the compiler replaced: it is asked for each layout of the table, and what it says is printed."""
    asked = []

    def compiled(c, t):
        asked.append((c, t))
        facts = {"memory": 2**34, "executed": 1.25, "mfu": {"as scheduled": 0.5}}
        return len(asked) - 1, facts if len(asked) < 2 else None
    monkeypatch.setattr(plan, "compile_layout", compiled)
    arguments = [str(ROOT / "configs/v2_d512.py"), "--plan", "--search=2", "--compile", "--topology=v4:2x2x1"]
    assert train.main(arguments) == 1
    out = capsys.readouterr().out
    assert len(set(asked)) == 2
    assert re.search(r" 1 planned .* compiled  16.0 GiB \(50 %\), executes 1.25 x, MFU 50.0 %", out)
    assert re.search(r" 2 planned .* compiled does not fit", out)


def test_a_plan_says_hours_at_an_mfu_that_is_named_and_at_the_machine_at_hand(capsys, monkeypatch):
    arguments = [str(ROOT / "configs/gpu_h200.py"), "--plan", "--mfu=0.4"]
    assert train.main([*arguments, "--topology=h100:1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"asked .* MFU 40.0 %, 7.2\d hours, 7.2\d chip-hours", out) and "core-hours to make them" in out
    monkeypatch.setattr(plan, "at_hand", lambda advice: "h100:1")
    assert train.main([*arguments, "--topology="]) == 0
    assert capsys.readouterr().out == out.replace("(h100:1)", "(at hand)")
    assert train.main([str(ROOT / "configs/gpu_h200.py"), "--search"]) == 2
    assert "--search: expected together with --plan" in capsys.readouterr().err


@pytest.mark.parametrize("google, ours", [("v4-2048", "v4:8x8x16"), ("2xv5p-1024", "2xv5p:8x8x8"),
                                          ("v5litepod-16", "v5e:4x4"), ("v5litepod:2x4", "v5e:2x4"),
                                          ("v5e-8", "v5e:2x4"), ("v6e-8", "v6e:2x4")])
def test_a_topology_has_two_names(google, ours):
    read = lambda word: plan.parse_topology(types.SimpleNamespace(topology=word))
    assert read(google) == read(ours)


@pytest.fixture
def no_machine_known(monkeypatch):
    """The machine at hand is looked for anew, in this test and after it."""
    monkeypatch.setattr(plan, "CHIPS", dict(plan.CHIPS))
    plan.at_hand.cache_clear()
    yield
    plan.at_hand.cache_clear()


@pytest.mark.usefixtures("no_machine_known")
@pytest.mark.parametrize("listed, words", [
    ("NVIDIA H100 80GB HBM3\n" * 8, "8 x h100 (at hand)"), ("NVIDIA A100-SXM4-40GB\n", "1 x a100_40gb (at hand)"),
    ("NVIDIA TITAN V\n", "topology: expected a chip in the table of configs/plan.py, found NVIDIA TITAN V"),
    ("No devices were found\n", "1 x cpu (at hand)"), ("", "1 x cpu (at hand)")])
def test_the_gpus_at_hand_are_what_nvidia_smi_lists(tmp_path, monkeypatch, capsys, listed, words):
    (tmp_path / "listed").write_text(listed)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/listed\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert train.main([str(ROOT / "configs/smoke.py"), "--plan"]) == (2 if "expected" in words else 0)
    said = capsys.readouterr()
    assert words in said.out + said.err


@pytest.mark.usefixtures("no_machine_known")
def test_the_tpu_at_hand_is_what_its_host_says(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
    assert train.main([str(ROOT / "configs/tpu_host.py"), "--plan", "--topology="]) == 0
    assert "8 x v6e (at hand)" in capsys.readouterr().out


def test_no_config_and_no_topology_ends_in_a_traceback():
    """A plan, or a ConfigError."""
    for name in ("smoke", "v2_d512", "moe_129b"):
        c, t = train.load_config(ROOT / f"configs/{name}.py")
        for machine in ("v4-8", "2xv4:2x2x1", "v5litepod-256", "h100:8", "a100:3", "v6e:1x1", "v4:1x1x7"):
            for more in ({"replicas": 0}, {"replicas": 2, "expert_parallel": 2}):
                try:
                    p = plan.plan(c, dataclasses.replace(t, topology=machine, **more))
                except train.ConfigError:
                    continue
                assert all(0 < x <= 1 for x in p["mfu"].values()) and 0 < p["reached"] <= 0.2


def test_a_node_of_gpus_is_planned_with_one_rate_for_all_links():
    """gpu_h200.py over 8 GPUs: weights and gradients of 1.2 B are gathered and scattered 16 times a step. Shorter
    microbatches leave more of each expert's last tile empty."""
    p, one = numbers("gpu_h200", "--topology=h100:8"), numbers("gpu_h200", "--topology=h100:1")
    assert p["mesh"]["data"] == 8 and p["executed"] == pytest.approx(one["executed"] / 8, rel=0.1)
    assert p["seconds"]["data"] == pytest.approx(sum(p["received"].values()) / 450e9)
    tokens = numbers("gpu_h200", "--topology=h100:8", "--expert_parallel=8", "--exchange=ragged", "--capacity_factor=1.0")
    moved = tokens["received"]["expert", "tokens, by ragged"]
    rest = sum(amount for (axis, _), amount in tokens["received"].items() if axis == "expert") - moved
    assert tokens["seconds"]["expert"] == pytest.approx((moved + rest) / 450e9), "a switch is no ring"


def test_the_third_line_is_at_the_mfu_of_others_and_data_and_checkpoints_are_sized(capsys):
    """14.5 hours on one GPU at 20 %; 6.63e9 tokens of 2 bytes; 12 bytes a parameter."""
    assert train.main([str(ROOT / "configs/gpu_h200.py"), "--plan"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"likely .* MFU 20.0 %, 14.5\d hours, 14.5\d chip-hours", out)
    assert "data      13.26 GB of shards (2 bytes a token)" in out
    assert re.search(r"saves     14.9\d GB a checkpoint .* 29.8\d GB for the 2 that are kept", out)
    assert "assumes   products in bfloat16" in out and out.count("bound ") == 1
    assert train.main([str(ROOT / "configs/smoke.py"), "--plan", "--topology=a100:1"]) == 0
    out = capsys.readouterr().out
    assert "assumes   products in float32 in TF32" in out and " 0.00 s" not in out and " 0.00 GB" not in out


def test_float32_is_not_measured_against_the_peak_of_bfloat16():
    """Data sheets: H100 SXM 989 and 494 (TF32), RTX 4090 165 and 83, dense. A TPU's float32 is not known."""
    peak = plan.PEAK_FLOPS
    assert peak["NVIDIA H100 80GB HBM3", "bfloat16"] == 989e12 == 2 * peak["NVIDIA H100 80GB HBM3", "float32"] + 1e12
    assert peak["NVIDIA GeForce RTX 4090", "float32"] == 82.6e12 and ("TPU v4", "float32") not in peak
    assert {"NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB"} <= {kind for kind, _ in peak}


@pytest.mark.parametrize("kind, dtype, mfu", [("NVIDIA H200", "bfloat16", "10.0%"), ("NVIDIA H200", "float32", "20.0%"),
                                              ("TPU v4", "float32", ""), ("a new card", "bfloat16", "")])
def test_the_log_line_knows_the_peak_of_the_type(kind, dtype, mfu):
    c, t = train.load_config(ROOT / "configs/smoke.py", [f"--compute_dtype={dtype}"])
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: None)
    mesh = types.SimpleNamespace(size=1, local_devices=[device])
    speed = 0.1 * 989e12 / model.count(c).mfu_flops
    row = dict.fromkeys(("loss", "ema", "gnorm", "lr", "maxvio", "drop", "seconds"), 1.0)
    words = report.line(c, t, mesh, row | {"step": 1, "tokens_per_second": speed}, 0)
    assert f"mfu {mfu} |" in words if mfu else "mfu" not in words


def test_compile_without_plan_does_not_train(capsys):
    assert train.main([str(ROOT / "configs/moe_129b.py"), "--compile"]) == 2
    assert "--compile: expected together with --plan" in capsys.readouterr().err


def test_traced_flops_counts_loops_and_branches():
    f = lambda x: lax.scan(lambda x, _: (lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), None), x,
                           None, length=5)[0]
    assert hlo.traced_flops(jax.make_jaxpr(jax.jit(f))(jnp.zeros((4, 4))).jaxpr) == 5 * 2 * 4**3


SIZE = {"replica": 1, "data": 4, "expert": 2}


def test_collectives_are_found_in_a_compiled_program():
    """Loops, axes and bytes of four known collectives, one of them in a loop of three."""
    mesh = jax.make_mesh((1, 4, 2), train.MESH, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:8])

    def f(x):
        def body(x, _):
            return x + lax.psum_scatter(lax.all_gather(x, "data", tiled=True), "data", tiled=True), None
        x, _ = lax.scan(body, x, None, length=3)
        return lax.psum(x, "expert"), lax.psum(jnp.sum(x), ("data", "expert"))
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=Spec("data"), out_specs=(Spec("data"), Spec()),
                                check_vma=False))
    compiled = run.lower(jax.ShapeDtypeStruct((32, 128), jnp.float32)).compile()
    found = {(x.op, x.axis): (x.times, x.received) for x in hlo.collectives(hlo.serialized(compiled), SIZE)}
    assert found["all-gather", "data"] == (3, 32 * 128 * 4 * 3 / 4)
    assert found["all-reduce", "expert"] == (1, 8 * 128 * 4) and found["all-reduce", "data+expert"][0] == 1


def program(body="", entry="", computations=""):
    """The serialized HLO of a step: `body` in a loop of 12 runs, `entry` after it. An operand is called %x."""
    return _hlo.hlo_module_from_text(f"""HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}

{computations}
%body (x: f32[1048576]) -> f32[1048576] {{
  %x = f32[1048576] parameter(0)
{body}
  ROOT %y = f32[1048576] copy(%x)
}}

%condition (x: f32[1048576]) -> pred[] {{
  %x = f32[1048576] parameter(0)
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%n, %n), direction=LT
}}

ENTRY %main (x: f32[1048576]) -> f32[1048576] {{
  %x = f32[1048576] parameter(0)
  %w = f32[1048576] while(%x), condition=%condition, body=%body
{entry}
  ROOT %y = f32[1048576] copy(%x)
}}
""").as_serialized_hlo_module_proto()


def line(op, groups="{{0,2,4,6},{1,3,5,7}}", scope="", elements=2**20):
    """One collective over the axis "data" of SIZE, unless groups says otherwise."""
    what = {"all-reduce": ", to_apply=%add", "reduce-scatter": ", dimensions={0}, to_apply=%add"}.get(op, ", dimensions={0}")
    metadata = f', metadata={{op_name="{scope}"}}' if scope else ""
    return f"  %c{abs(hash((op, groups, scope, elements)))} = f32[{elements}] {op}(%x), replica_groups={groups}{what}{metadata}"


@pytest.mark.parametrize("groups, axis", [
    ("{{0,2,4,6},{1,3,5,7}}", "data"), ("{{0,1},{2,3},{4,5},{6,7}}", "expert"),
    ("[2,4]<=[4,2]T(1,0)", "data"), ("[4,2]<=[8]", "expert"), ("[1,8]<=[8]", "data+expert"),
    ("mesh['replica'=1,'data'=4,'expert'=2] {'data'}", "data"), ("mesh['a'=4,'b'=2] {'b'}", "expert"),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", "data"), ("{{0,1,2,3},{4,5,6,7}}", ""),
    ("mesh['a'=8] {'a':(1)2}", hlo.UNREADABLE)])
def test_groups_of_devices_are_read_however_they_are_written(groups, axis):
    """As lists, as an array of devices transposed, as axes of a mesh; no axes of ours; a part of an axis."""
    try:
        blob = program(entry=line("all-reduce", groups))
    except Exception as error:
        pytest.skip(f"this jaxlib does not parse {groups}: {str(error)[:80]}")
    (found,) = hlo.collectives(blob, SIZE)
    assert found.axis == axis and found.op == "all-reduce" and found.times == 1


LOOP = "jit(train_step)/shard_map/while/body/closed_call/transpose(jvp())/while/body/closed_call"
PSUM = "jit(train_step)/shard_map/psum"


@pytest.mark.parametrize("op, scope, once, want", [
    ("all-gather", f"{LOOP}/all_gather", PSUM, []),
    # what the v4 compiler makes of the reduce-scatter of [5120,128256]: a sum that names no line
    ("all-reduce", "", PSUM, [("loop", hlo.SUMMED)]),
    # a whole weight's gradient summed in the layer loop: someone wrote psum for psum_scatter
    ("all-reduce", f"{LOOP}/psum", PSUM, [("loop", "not of the layer loop")]),
    ("all-to-all", f"{LOOP}/all_to_all", PSUM, [("loop", "not of the layer loop")]),
    # a sharded contraction in the optimizer, which XLA sums whole over data
    ("all-gather", f"{LOOP}/all_gather", "jit(train_step)/dot_general", [("once", "no line asks for it")]),
    ("all-gather", f"{LOOP}/all_gather", "jit(train_step)/shard_map/reduce_scatter",
     [("once", "not what its line asks for")])])
def test_unexpected_collectives_are_named(op, scope, once, want):
    """An all-reduce over "data" passes where a psum asks for it, and nowhere else."""
    body = [line("reduce-scatter", scope=f"{LOOP}/reduce_scatter", elements=2**20), line(op, scope=scope)]
    entry = [line("all-reduce", scope="jit(train_step)/reduce_sum", elements=64), line("all-reduce", scope=once)]
    found = hlo.collectives(program("\n".join(body), "\n".join(entry)), SIZE)
    assert len(found) == 4 and {x.axis for x in found} == {"data"}
    named = hlo.unexpected(found)
    assert [("loop" if x.times == 12 else "once", x.wrong) for x in named] == want
    assert all(x.received == 2 * 2**22 * 3 / 4 for x in named if x.op == "all-reduce")


@pytest.mark.parametrize("emitter, op, wrong", [("SingleInputAllReduceScatterFusion", "reduce-scatter", []),
                                                ("SingleInputAllReduceFusion", "all-reduce", [hlo.SUMMED])])
def test_a_padded_reduce_scatter_is_one(emitter, op, wrong):
    """[5120,1280] over 128 chips of v4, here over 4: an all-reduce by opcode, a reduce-scatter by its emitter."""
    fused = """%fused (input: f32[1048576]) -> f32[1966080] {
  %input = f32[1048576] parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[7864320] all-reduce(%input), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %mine = f32[1966080] dynamic-slice(%sum, %zero), dynamic_slice_sizes={1966080}
}
"""
    entry = f"""  %f = f32[1966080] fusion(%x), kind=kCustom, calls=%fused, backend_config={{"emitter":"{emitter}"}}
  %p = f32[1966080] collective-permute(%f), source_target_pairs={{{{0,2}},{{2,4}}}}"""
    reduced, permute = hlo.collectives(program("", entry, fused), SIZE)[::-1]
    assert (reduced.op, reduced.axis) == (op, "data") and permute.op == "collective-permute"
    assert reduced.received == {"reduce-scatter": 3 * 4 * 1966080, "all-reduce": 2 * 3 * 4 * 1966080}[op]
    assert [x.wrong for x in hlo.unexpected([reduced, permute])] == wrong


def test_a_program_for_two_slices_is_that_of_one_of_them():
    """Its groups count the devices of a slice; what crosses slices is sent through the hosts."""
    entry = "\n".join([
        line("all-reduce", "{{0,2},{1,3}}"), "  %t = token[] after-all()",
        "  %send = (f32[1048576], u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true, "
        'frontend_attributes={_handler="xla_megascale_runtime"}',
        "  %host = (f32[1048576], u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true"])
    four_partitions = b"\x7a\x02\x10\x04"                 # device_assignment { computation_count: 4 }
    found = hlo.collectives(program(entry=entry) + four_partitions, {"replica": 2, "data": 2, "expert": 2})
    assert [(x.op, x.axis) for x in found] == [("all-reduce", "data"), ("all-reduce", "replica")]
    assert [x.received for x in found] == [2**22, 2**22]
    assert [x.wrong for x in hlo.unexpected(found)] == [hlo.SUMMED]


@pytest.mark.parametrize("body, want", [
    # a gather of 1 second before a product of 2: one after the other, or the product hides it
    ("""  %g = f32[4194304] all-gather(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %p = f32[1024,1024] dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}""", 3),
    ("""  %g = (f32[1048576], f32[4194304]) all-gather-start(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %p = f32[1024,1024] dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d = f32[4194304] all-gather-done(%g)""", 2),
    # two gathers share the links of their axis: the second ends at 2 seconds, and nothing stands before its end
    ("""  %g = (f32[1048576], f32[4194304]) all-gather-start(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %h = (f32[1048576], f32[4194304]) all-gather-start(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %d = f32[4194304] all-gather-done(%g)
  %e = f32[4194304] all-gather-done(%h)
  %p = f32[1024,1024] dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}""", 4)])
def test_a_schedule_hides_what_runs_between_start_and_done(body, want):
    """In a loop of 12 runs: a product takes 2 seconds, a gather over "data" 1."""
    text = "  %m = f32[1024,1024] reshape(%x)\n" + body
    line = hlo.Timeline(program(body=text), SIZE, lambda x: 1.0 if x.axis == "data" else 1e9, 1024**3)
    assert line.total == pytest.approx(12 * want) and line.computed == pytest.approx(12 * 2)


def test_what_cannot_be_read_is_said_and_nothing_is_made_of_it(capsys):
    """Groups in an unknown form (here: none), and a loop whose length is not in its condition."""
    for blob in (program(entry=line("all-reduce", "{{0,1}}")), hide_constant(program(body=line("all-gather")))):
        (found,) = hlo.collectives(blob, SIZE)
        assert found.axis == hlo.UNREADABLE and hlo.unexpected([found]) == []
        well, words = hlo.report([found], 1e9)
        assert not well and "1 of 1 collectives" in words and "unreadable" in words
        assert "together 0.0 GB" in capsys.readouterr().out


def hide_constant(blob):
    """The program with the literal of its constant under a field number that nobody knows."""
    literal = b"\x42"                                       # field 8, a message
    at = blob.index(b"\x12\x08constant")
    at = blob.index(literal, at)
    return blob[:at] + b"\x7a" + blob[at + 1:]


def test_a_tenth_of_the_bytes_may_move_in_sums_but_no_byte_unasked(capsys):
    gather = hlo.Collective("all-gather", "data", 12, 1e9, 1, f"{LOOP}/all_gather")
    summed, stray = gather._replace(op="all-reduce", scope=""), gather._replace(op="all-to-all")
    for found, well, words in (([gather] * 3, True, "every collective is where it should be"),
                               ([gather] * 19 + [summed] * 2, True, "9.5 % of the bytes"),
                               ([gather] * 17 + [summed] * 3, False, "15.0 % of the bytes"),
                               ([gather] * 99 + [stray], False, "1.0 % of the bytes")):
        got, said = hlo.report(found, 1e9)
        assert got == well and words in said
        assert f"together {12 * len(found)}.0 GB" in capsys.readouterr().out


@pytest.mark.parametrize("window", [4096, 2048])
def test_attention_counts_among_the_executed_flops(window):
    """Splash attention gives no estimate of its own. Blocks of 1,024: of 16, causality leaves 10, the window 9;
    2 products forward, 3 for dq, 4 for dk and dv. The rest is the sum of y * dy."""
    shape = lambda heads: jax.ShapeDtypeStruct((2, 4096, heads, 128), jnp.bfloat16)
    grad = jax.grad(lambda q, k, v, segment: jnp.sum(kernels.attention(
        q, k, v, segment, window, "splash", "tpu").astype(jnp.float32)), (0, 1, 2))
    jaxpr = jax.make_jaxpr(grad)(shape(4), shape(2), shape(2), jax.ShapeDtypeStruct((2, 4096), jnp.int32))
    blocks = sum(0 <= i - j and (i - j - 1) * 1024 + 1 < window for i in range(4) for j in range(4))
    assert blocks == {4096: 10, 2048: 9}[window]
    want = (2 + 3 + 4) * 2 * 2 * 4 * 128 * blocks * 1024**2
    assert hlo.traced_flops(jaxpr.jaxpr) == pytest.approx(want, rel=1e-4)


@pytest.mark.endurance
@pytest.mark.parametrize("path", [p for p in sorted((ROOT / "configs").glob("*.py"))
                                  if 'topology = "v' in p.read_text() or "_d" in p.stem], ids=lambda p: p.stem)
def test_every_config_compiles_for_its_topology(path):
    """The whole step through the TPU compiler, one period of layers deep: the scan makes the program the same at
    any depth, and only what is held per layer (state, layer inputs: --plan) grows. Full depth: see LOG.md."""
    pytest.importorskip("libtpu")
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), str(path), "--plan", "--compile",
                           "--num_layers=4"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict   fits; " in done.stdout
    executed = float(re.search(r"executes ([\d.]+) x", done.stdout)[1])
    # recipe V2: 0.05 is Newton-Schulz, 0.03 capacity 1.25 [measured], the rest tiles of 256 experts [assumed]
    assert 0.9 < executed < (1.52 if path.stem.startswith("v2") else 1.40), executed

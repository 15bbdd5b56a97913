"""Whether the gate says of an idea what is so, from losses whose truth is known."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import scaling
from configs.ladder import gate

LAW = scaling.Law(0.8, 60.0, 0.1)
BUDGETS = 3e11, 1e12


def losses(rng, worth, noise, seeds=3, budgets=BUDGETS):
    """{C: (base, variant)}: the variant reaches what the base reaches with `worth` times the compute. Seeds
    shift both sides alike, and each side has noise of its own."""
    found = {}
    for C in budgets:
        shared = rng.normal(0, 0.02, seeds)
        both = [LAW.E + LAW.A * (C * factor) ** -LAW.alpha + shared + rng.normal(0, noise, seeds)
                for factor in (1, worth)]
        found[C] = tuple(side.tolist() for side in both)
    return found


@pytest.mark.parametrize("worth, noise, verdict", [
    (1.5, 0.005, "holds"), (0.8, 0.005, "does not hold"), (1.0, 0.002, "does not hold"),
    (1.1, 0.04, "undecided")])
def test_a_known_worth_gets_its_verdict(worth, noise, verdict):
    found = gate.compare(losses(np.random.default_rng(0), worth, noise), LAW)
    assert found["verdict"] == verdict
    assert (found["more_seeds"] is not None) == (verdict == "undecided")
    if noise < 0.01:
        assert found["speedup"] == pytest.approx(worth, rel=0.1)
        assert found["at_least"] < worth < found["at_most"]


def test_base_against_base_seldom_holds_and_bounds_are_right_in_95_of_100():
    rng, held, below = np.random.default_rng(1), 0, 0
    for _ in range(1000):
        found = gate.compare(losses(rng, 1.0, 0.01), LAW)
        held += found["verdict"] == "holds"
        below += found["at_least"] < 1
    assert held < 65 and 930 < below < 970


def test_seeds_asked_for_decide():
    rng = np.random.default_rng(2)
    found = gate.compare(losses(rng, 1.2, 0.1), LAW)
    assert found["verdict"] == "undecided" and 1 < found["more_seeds"] < 100
    decided = {seeds: sum(gate.compare(losses(rng, found["speedup"], 0.1, seeds), LAW)["verdict"]
                          != "undecided" for _ in range(100))
               for seeds in (3, 3 + 2 * found["more_seeds"])}
    assert decided[3] < 50 < decided[3 + 2 * found["more_seeds"]]


def test_pairs_cancel_what_seeds_share():
    rng = np.random.default_rng(3)
    found = gate.compare(losses(rng, 1.2, 0.001), LAW)
    assert found["verdict"] == "holds" and found["budgets"][0]["standard_error"] < 0.005


def test_a_loss_below_the_law_and_a_single_seed_are_refused():
    with pytest.raises(scaling.BadInput, match="losses above E = 0.8"):
        gate.compare({1e12: ([3.0, 3.1], [0.7, 3.0])}, LAW)
    with pytest.raises(scaling.BadInput, match="two seeds or more"):
        gate.compare({1e12: ([3.0], [2.9])}, LAW)


def said(capsys, flops, seconds, **more):
    """What conclude prints and returns of two sides with these FLOPs and seconds a step."""
    workers = [SimpleNamespace(facts={"memory": 2**20, "executed": f * more.get("over", (1, 1))[i]})
               for i, f in enumerate(flops)]
    rows = [{"config": f"{name}_c3e11_s{seed}", "loss": 3.0 + 0.01 * seed, "bpb": 2.0, "eval": "text",
             "eval_bytes": 9} for name in ("base", "mine") for seed in (0, 1)]
    a = SimpleNamespace(fork=["mine.py"], rest=[], budgets=[3e11], seeds=2, law=(0.8, 0.1),
                        json=more.get("json"))
    gate.conclude(a, {row["config"]: row for row in rows}, rows, workers, seconds,
                  {"base": {"flops": flops[0]}, "mine": {"flops": flops[1]}})
    return capsys.readouterr().out


def test_wall_clock_compares_rates_of_flops_not_of_tokens(capsys, tmp_path):
    """A variant that costs twice the FLOPs a token and runs them at the same rate takes twice as long a step,
    and half the steps: the clock is neutral. By tokens per second it would be 0.5."""
    path = tmp_path / "verdict.json"
    said(capsys, (1e9, 2e9), (0.01, 0.02), json=str(path))
    assert json.loads(path.read_text())["wall_clock"] == pytest.approx(1.0)
    assert "speed-up 0.500" in said(capsys, (1e9, 1e9), (0.01, 0.02))


def test_a_variant_that_computes_more_than_it_counts_is_told_so(capsys):
    assert "warning" not in said(capsys, (1e9, 1e9), (0.01, 0.01), over=(1.3, 1.32))
    assert "executes 2.60 times" in said(capsys, (1e9, 1e9), (0.01, 0.01), over=(1.3, 2.6))


def test_budgets_are_training_flops_not_active_parameters():
    """Steps come from what the side's own code counts: 18 % apart from 6 x parameters x tokens."""
    worker = SimpleNamespace(ask=lambda take, keys: {"flops": 3.3e9})
    side = gate.Side(gate.ROOT, "base.py", ("--num_experts=32",))
    rows, _ = gate.planned(side, worker, 3e11, {"hidden_dim": 32}, [0, 1], "out", "mine")
    assert "--steps=91" in rows[0]["overrides"] and len(rows) == 2
    assert float(rows[0]["planned_flops"]) == pytest.approx(91 * 3.3e9)
    assert rows[1]["overrides"].endswith("--num_experts=32") and "--seed=1" in rows[1]["overrides"]


def test_what_a_fork_can_be(tmp_path):
    base, variant = gate.sides_of(["--optimizer=muonh"], gate.BASE)
    assert variant == base._replace(keys=("--optimizer=muonh",))
    (tmp_path / "mine.py").write_text("steps = 1")
    assert gate.sides_of([str(tmp_path / "mine.py")], gate.BASE)[1].checkout == gate.ROOT
    assert gate.sides_of([str(gate.ROOT)], gate.BASE)[1].config == str(gate.ROOT / gate.BASE)
    for words, message in (([], "found nothing"), (["a", "b"], "expected a config"),
                           ([str(tmp_path)], "a checkout with train.py"), (["none.py"], "no such file")):
        with pytest.raises(scaling.BadInput, match=message):
            gate.sides_of(words, gate.BASE)


def test_a_table_of_other_runs_is_not_taken_for_these(tmp_path):
    row = {"config": "base_c3e11_s0", "base": "b.py", "checkout": "/x", "overrides": "--seed=0",
           "planned_flops": "3e11", "loss": "", "seed": "0"}
    gate.merge(tmp_path / "runs.csv", [row])
    gate.merge(tmp_path / "runs.csv", [row])
    with pytest.raises(scaling.BadInput, match="expected the run that this command plans"):
        gate.merge(tmp_path / "runs.csv", [row | {"overrides": "--seed=0 --clip=2"}])
    assert math.isfinite(float(scaling.read_table(tmp_path / "runs.csv")[1][0]["planned_flops"]))

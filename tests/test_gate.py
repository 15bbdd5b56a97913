"""Whether the gate says of an idea what is so, from losses whose truth is known."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import model
import scaling
from configs.ladder import calibrate
from configs.ladder import gate
from configs.ladder import plan
from configs.ladder import worker
from tests import rivals            # noqa: F401  (a file that code can depend on)

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


def said(capsys, flops, seconds, unit="loss", **more):
    """What conclude prints and returns of two sides with these FLOPs and seconds a step."""
    facts = [{"memory": 2**20, "executed": f * more.get("over", (1, 1))[i]} for i, f in enumerate(flops)]
    sides = [gate.Side(gate.ROOT, "base.py", (), name) for name in ("base", "mine")]
    budgets = [gate.Budget(side, None, 3e11, side.name, [], f) for side, f in zip(sides, flops)]
    runs = {name: [{"loss": loss, "bpb": bpb + 0.01 * seed} for seed in (0, 1)]
            for name, loss, bpb in (("base", 3.0, 2.0), ("mine", more.get("loss", 3.0), 2.0))}
    a = SimpleNamespace(law=(0.8, 0.1), json=more.get("json"))
    gate.conclude(a, budgets, runs, unit, facts, seconds)
    return capsys.readouterr().out


def test_wall_clock_compares_rates_of_flops_not_of_tokens(capsys, tmp_path):
    """A variant that costs twice the FLOPs a token and runs them at the same rate takes twice as long a step,
    and half the steps: the clock is neutral. By tokens per second it would be 0.5, and a variant of 1.18 times
    the FLOPs a token 0.85."""
    path = tmp_path / "verdict.json"
    for more in (2, 1.18):
        said(capsys, (1e9, more * 1e9), (0.01, more * 0.01), json=str(path))
        assert json.loads(path.read_text())["wall_clock"] == pytest.approx(1.0)
    assert "speed-up 0.500" in said(capsys, (1e9, 1e9), (0.01, 0.02))


def test_a_variant_that_computes_more_than_it_counts_is_told_so(capsys):
    assert "warning" not in said(capsys, (1e9, 1e9), (0.01, 0.01), over=(1.3, 1.32))
    assert "executes 2.60 times" in said(capsys, (1e9, 1e9), (0.01, 0.01), over=(1.3, 2.6))


def test_a_product_that_count_does_not_know_is_found_in_the_traced_step():
    import jax
    from tests import hlo
    x = jax.numpy.ones((8, 8))
    plain, more = (hlo.traced_flops(jax.jit(jax.grad(f)).trace(x).jaxpr.jaxpr)
                   for f in (lambda x: (x @ x).sum(), lambda x: (x @ x @ x).sum()))
    assert more > 1.5 * plain > 0


def test_budgets_are_training_flops_not_active_parameters():
    """A variant with twice the context has the parameters of the base and 23 % more FLOPs a token, for attention.
    It gets 18 % fewer tokens, so that both spend the budget; by parameters it would get as many."""
    config, sizes = str(gate.ROOT / gate.BASE), {"hidden_dim": 24, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1,
                                                 "head_dim": 24, "expert_dim": 16, "shared_dim": 24, "batch_size": 16}
    spent, tokens, parameters = [], [], []
    for keys in ((), ("--seq_len=256", "--batch_size=8")):
        def ask(name, words):
            c, t = plan.load(config, {}, [*words, *keys])
            parameters.append(model.count(c).params)
            return {"flops": model.count(c).mfu_flops * t.batch_size * c.seq_len, "code": ""}
        budget = gate.planned(SimpleNamespace(ask=ask, side=gate.Side(gate.ROOT, config, keys, "mine")), 3e11, sizes)
        row = gate.row_of(budget, 1)
        assert row["seed"] == "1" and row["overrides"].endswith(" ".join(keys))
        spent.append(float(row["flops"]))
        tokens.append(plan.load(config, {}, row["overrides"].split())[1].steps * 16 * 128)
    assert len({*parameters}) == 1 and 0.8 < tokens[1] / tokens[0] < 0.83
    assert max(spent) / min(spent) < 1.003


def test_another_tokenizer_is_compared_in_bits_per_byte_and_another_text_refused(capsys):
    nats, bits = ({"heldout": "a", "tokenizer": name} for name in ("bpe", "bytes"))
    assert gate.unit_of([nats, nats], ["base", "mine"]) == "loss"
    assert gate.unit_of([nats, bits], ["base", "mine"]) == "bpb"
    with pytest.raises(scaling.BadInput, match="mine: expected the held-out text of base"):
        gate.unit_of([nats, nats | {"heldout": "b"}], ["base", "mine"])
    text = said(capsys, (1e9, 1e9), (0.01, 0.01), "bpb", loss=1.5)     # half the nats, tokens half as long
    assert "+0.0000 bits per byte" in " ".join(text.split()).replace("+- 0.0000 ", "")
    assert "speed-up 1.000" in text


def test_what_a_fork_can_be(tmp_path):
    out = tmp_path / "out"
    base, variant = gate.sides_of(["--optimizer=muonh"], gate.BASE, out)
    assert variant == base._replace(keys=("--optimizer=muonh",), name="optimizer-muonh")
    (tmp_path / "mine.py").write_text("steps = 1")
    assert gate.sides_of([str(tmp_path / "mine.py")], gate.BASE, out)[1].checkout == base.checkout
    assert gate.sides_of([str(gate.ROOT)], gate.BASE, out)[1].config == base.config     # the same code
    for words, message in (([], "found nothing"), (["a", "b"], "expected a config"),
                           ([str(tmp_path)], "a checkout with train.py"), (["none.py"], "no such file")):
        with pytest.raises(scaling.BadInput, match=message):
            gate.sides_of(words, gate.BASE, out)


def test_a_patch_makes_another_code_and_the_ideas_fit_this_one(tmp_path):
    """If one fails after an edit of the seven files: apply it by hand and write it anew by `git diff -U1`."""
    text = {path.name: path.read_bytes() for path in gate.ROOT.glob("*.py")}
    for patch in sorted((gate.ROOT / "configs/ladder/ideas").glob("*.patch")):
        folder = gate.frozen(gate.ROOT, tmp_path, patch)
        changed = [path for path in folder.glob("*.py") if path.read_bytes() != text[path.name]]
        assert changed, patch
        for path in changed:
            compile(path.read_bytes(), path, "exec")
    with pytest.raises(scaling.BadInput, match="a patch that fits"):
        gate.frozen(folder, tmp_path, patch)                            # twice


def test_a_comment_is_no_other_code(tmp_path):
    texts = {"a": "x = 1\n", "b": "x = 1       # one\n", "c": "x = 2\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    a, b, c = (worker.digest({tmp_path / name}, "config") for name in texts)
    assert a == b and len({a, c, worker.digest({tmp_path / "a"}, "other")}) == 3
    assert {Path(path).name for path in worker.loaded(gate.ROOT)} >= {"train.py", "rivals.py", "gate.py"}


def test_a_worker_that_has_died_is_bad_input_each_time(tmp_path):
    """A checkout without code ends the worker; asking again meets a closed pipe, which must not end as `| head` does."""
    dead = gate.Worker(gate.Side(tmp_path, "c.py", (), "this fork"))
    for _ in range(2):
        with pytest.raises(scaling.BadInput, match="this fork: expected an answer to count"):
            dead.ask("count", [])
        dead.process.wait()
    dead.close()



def test_the_tables_of_the_calibration_say_what_the_readme_says(capsys):
    """base against base from aa.csv, losses that were trained; at most 3 of 40 hold."""
    assert calibrate.show() == 0
    text = capsys.readouterr().out
    assert f"Base against base, {calibrate.GATES} gates" in text
    shown = [line for line in text.splitlines() if "|" in line or "Base against" in line]
    readme = (gate.ROOT / "configs/ladder/README.md").read_text()
    told = [line for line in readme[readme.index("Base against"):].splitlines() if "|" in line or "Base" in line]
    assert len(told) == 10 and {*told} <= {*shown}, {*told} - {*shown}
    tried = {row["name"]: row for row in calibrate.read(calibrate.VERDICTS)}
    ideas = {path.stem for path in (gate.ROOT / "configs/ladder/ideas").glob("*.patch")}
    assert tried.keys() <= calibrate.KNOWN.keys() | ideas and tried["rates 4 times lower"]["verdict"] == "does not hold"


def test_agents_md_is_true():
    text = (gate.ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) <= 60
    for name in re.findall(r"[\w/]+\.(?:py|patch|csv|md)\b", text):
        assert (gate.ROOT / name).is_file(), name
    for name in ("route", "RULES", "param_specs", "make_optimizer", "count", "heavy_ball"):
        owner = re.search(rf"`{name}` in\s+([\w/]+\.py)", text)[1]
        assert re.search(rf"^(def {name}\(|{name} = )", (gate.ROOT / owner).read_text(), re.M), name
    commands = [line.split() for line in re.findall(r"^ {7}(\w.*)$", text, re.M)]
    assert [words[:2] for words in commands[1:]] == [["python", "configs/ladder/corpus.py"], ["python", "scaling.py"]]
    a, rest = scaling.parser().parse_known_args(commands[-1][2:])
    assert a.do is gate.gate and a.fork == ["../my_idea"] and not rest
    example = re.findall(r"^    ([+-] .*)$", text, re.M)
    patch = (gate.ROOT / "configs/ladder/ideas/residual_gain.patch").read_text()
    assert example == re.findall(r"^[+-] .*$", patch, re.M) and len(example) <= 5


def budget_of(label, losses, asked):
    """A Budget whose runs end with these losses."""
    def ask(name, words, seed, key):
        number = gate.seeds_of(3e11, 9).index(seed)
        asked.append((label, number))
        return {"loss": losses[number], "bpb": losses[number], "seconds": 1.0}
    side = gate.Side(gate.ROOT, "b.py", (), label)
    return gate.Budget(side, SimpleNamespace(ask=ask), 3e11, label, ["--steps=9"], 1e9)


def test_what_is_in_the_table_is_not_trained_again(tmp_path):
    asked, a = [], SimpleNamespace(out=tmp_path, jobs=2, seeds=2, minutes=None)
    budgets = [budget_of("base-1", [3.0, 3.1, 3.2], asked), budget_of("mine-2", [2.9, None, 3.0], asked)]
    found = gate.train_pairs(a, budgets)
    assert len(asked) == 4 and [row["loss"] for row in found["mine-2"]] == [2.9, "diverged"]
    found = gate.train_pairs(SimpleNamespace(**vars(a) | {"seeds": 3}), [budgets[0], budget_of("mine-3", [1, 2, 3], asked)])
    assert asked[4:].count(("base-1", 2)) == 1 and len(asked) == 8      # other code, other runs
    assert [float(row["loss"]) for row in found["base-1"]] == [3.0, 3.1, 3.2]
    rows = scaling.read_table(tmp_path / "runs.csv")[1]
    assert len(rows) == 8 and {row["flops"] for row in rows} == {"9e+09"}


def test_no_seed_is_used_at_two_budgets():
    """Equal seeds made the gains of two budgets alike: 6 pairs counted as 6 were 3."""
    seeds = [seed for C in (3e9, 6e9, 3e10, 9e10, 3e11, 1e12, 3e12, 1e13) for seed in gate.seeds_of(C, 999)]
    assert len({*seeds}) == len(seeds) and gate.seeds_of(1e12, 3) == gate.seeds_of(1e12, 5)[:3]


def test_minutes_decide_how_many_seeds_and_losses_do_not(tmp_path, monkeypatch):
    clock, asked = iter(range(0, 10_000, 60)), []                       # a minute a seed
    monkeypatch.setattr(gate.time, "monotonic", lambda: next(clock))
    found = gate.train_pairs(SimpleNamespace(out=tmp_path, jobs=1, seeds=9, minutes=3.5),
                             [budget_of("base-1", range(1, 9), asked)])
    assert len(found["base-1"]) == 3


@pytest.mark.slow
def test_a_gate_of_two_tokenizers_trains_and_compares_bits_per_byte(config, tmp_path, capfd):
    with open(config, "a") as file:
        file.write("devices = 1\n")
    code = scaling.main(["gate", "--tokenizer=bpe:260", "--vocab_size=260", "--base", str(config), "--budgets", "3e8",
                         "--seeds", "2", "--out", str(tmp_path / "gate"), "--law", "0.01", "0.1"])
    text = "".join(capfd.readouterr())
    assert code in gate.VERDICTS.values() and "bits per byte" in text and "2 seeds" in text, text
    rows = scaling.read_table(tmp_path / "gate/runs.csv")[1]
    assert len(rows) == 4 and len({row["loss"] for row in rows}) == 4   # seeds and sides differ

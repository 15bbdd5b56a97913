"""configs/ladder: its rungs, its tables, its registered forecasts, and the pictures drawn from them."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
import scaling
import train
from configs.ladder import copying, curves, figures, plan, seeds
from configs.ladder import noise as noise_study

ROOT = Path(__file__).resolve().parent.parent
LADDER = ROOT / "configs" / "ladder"
RECORDS = ("forecast_10x", "forecast_30x", "forecast_30x_second")


def table(*names):
    """{config: row} of a table in configs/ladder; its runs came from committed code."""
    _, rows = scaling.read_table(LADDER.joinpath(*names))
    assert not any(row["commit"].endswith("dirty") for row in rows)
    assert len({row["config"] for row in rows}) == len(rows)
    return {row["config"]: row for row in rows}


# ------------------------------------------------------------------------------------------------ the configs

SIZES = ("--hidden_dim=32", "--num_layers=2", "--num_heads=4", "--num_kv_heads=1", "--shared_dim=32",
         "--expert_dim=16", "--steps=20")
DENSE = ("--hidden_dim=32", "--num_layers=2", "--num_heads=4", "--num_kv_heads=4", "--shared_dim=128",
         "--steps=20")


def test_each_rung_inherits_the_one_before_and_changes_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = []
    for path in sorted((LADDER / "rungs").glob("?_*.py")):
        c, t = train.load_config(path, DENSE if path.stem[0] in "ab" else SIZES)
        found.append((t.optimizer, t.recipe, c.num_experts, c.half_rope, c.partial_key_offset, c.combine_sum))
        if len(found) > 1:
            assert f"from configs.ladder.rungs.{before} import *" in path.read_text()
        before = path.stem
        assert len(path.read_text().splitlines()) <= 16
    assert found == [("adamw", "v1", 0, False, False, 0.0), ("adamh", "v1", 0, False, False, 0.0),
                     ("adamh", "v1", 16, False, False, 0.0), ("adamh", "v1", 64, False, False, 0.0),
                     ("muonh", "v2", 64, False, False, 0.0), ("muonh", "v2", 64, True, True, 2.5)]


@pytest.mark.slow
def test_adamw_is_adam_with_the_decay_apart(monkeypatch):
    """Three steps against the update written out: matrices decay at the rate, gains and embedding do not."""
    monkeypatch.chdir(ROOT)
    keys = "--weight_decay=0.5", "--clip=0.0", "--lr_scale=1.5", "--adam_lr_scale=2.0", "--warmup=0.0"
    c, t = train.load_config(LADDER / "rungs" / "a_dense_adamw.py", (*DENSE, *keys))
    params = model.init(c, jax.random.key(0))
    optimizer, r = train.make_optimizer(c, t), train.rates(c, t)
    tokens = t.steps * t.batch_size * c.seq_len
    assert r.adam_lr == pytest.approx(3 * scaling.heuristic("v1", tokens, t.batch_size * c.seq_len, 32).adam_lr)
    groups = model.map_params(lambda path, w: w.group, c)
    state, w = optimizer.init(params), params
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    for step in range(3):
        grads = jax.tree.map(lambda x: jnp.sin(x * (step + 5)), params)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
        lr = r.adam_lr * float(train.lr_multiplier(t, step))

        def move(w, m, v, group):
            u = (m / (1 - 0.9**(step + 1))) / (jnp.sqrt(v / (1 - 0.95**(step + 1))) + 1e-8)
            return w - lr * (u + (0.0 if group == "adam" else 0.5) * w)
        w = jax.tree.map(move, w, m, v, groups)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), params, w)


# ------------------------------------------------------------------------------------------------- the tables

@pytest.mark.parametrize("folder, count", [("isoflop", 32), ("hero", 3), ("rung_runs", 60), ("third", 118)])
def test_every_row_says_how_its_run_is_trained_again(folder, count, monkeypatch):
    """Its base and overrides load, and give the parameters, tokens and FLOPs that its result has."""
    monkeypatch.chdir(ROOT)
    rows = table(folder, "runs.csv")
    assert len(rows) == count
    for name, row in rows.items():
        c, t = train.load_config(row["base"], row["overrides"].split())
        n, tokens = model.count(c), t.steps * t.batch_size * c.seq_len
        assert (n.params, tokens, str(t.seed)) == (int(row["params"]), int(row["tokens"]), row["seed"]), name
        assert n.mfu_flops * tokens == int(row["flops_with_head"])
        assert abs(n.mfu_flops * tokens / float(row["planned_flops"]) - 1) < 0.03
        assert str(c.hidden_dim) == row["width"] and Path(t.run_dir).name == f"{folder}_{name}"


def test_plan_writes_the_rows_of_the_table_again(tmp_path, monkeypatch):
    """The first command that configs/ladder/README.md names for the isoFLOP runs, at two budgets."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "isoflop" / "runs.csv"
    words = ("ladder --config configs/ladder/rungs/c_moe_v1.py --count-head --aspect 32 --batch 16 --unit 8 "
             "--group 1 --law 0.11 0.6 --widths 6 --span 2.8 --budgets 3e11 9e12 --out").split()
    assert scaling.main([*words, str(out)]) == 0
    ours = table("isoflop", "runs.csv")
    _, planned = scaling.read_table(out)
    assert len(planned) == 11
    for row in planned:
        base = "configs/ladder/rungs/c_moe_v1.py"
        again, before = (train.load_config(base, r["overrides"].split()) for r in (row, ours[row["config"]]))
        assert again == before


def test_a_table_keeps_its_rows_whatever_is_planned_or_put(tmp_path, monkeypatch, capsys):
    """Seeds in any order; two rows of one name, of which a write would lose one; a table with other columns."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "runs.csv"
    words = ("ladder --config configs/ladder/third.py --count-head --layers 2 --heads 2 --group 1 --unit 8 --batch 8 "
             "--law 0.0138 0.66 --budgets 3e11 --widths 1 --seeds 1 0 --out").split()
    assert scaling.main([*words, str(out)]) == 0
    rows = scaling.read_table(out)[1]
    assert [plan.without_seed(row["overrides"])[1] for row in rows] == [1, 0] and len({*rows[0]}) == 7
    plan.put_rows(out, rows[0] | {"loss": "3.5"})
    text = out.read_text()
    assert scaling.main([*words, str(out)]) == 0 and out.read_text() == text and ",3.5" in text
    out.write_text(text + text.splitlines()[1].replace("third.py", "mine.py") + "\n")
    twice = out.read_text()
    assert scaling.main([*words, str(out)]) == 2 and out.read_text() == twice
    with pytest.raises(scaling.BadInput, match="each name in the column config once"):
        plan.put_rows(out, rows[1])
    times = tmp_path / "speed.csv"              # not a ladder's columns
    plan.put_rows(times, {"config": "a", "milliseconds": "2"}, {"config": "b", "milliseconds": "3"})
    plan.put_rows(times, {"config": "b", "milliseconds": "1"})
    assert times.read_text() == "config,milliseconds\na,2\nb,1\n"
    out.write_text("a,b\n1,2\n")
    assert scaling.main([*words, str(out)]) == 2 and out.read_text() == "a,b\n1,2\n"
    assert "expected columns config" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["noise.py", "none.csv"], "No such file"), (["noise.py"], "a table, or --budgets"),
    (["noise.py", "--budgets", "1e12", "1e13", "--targets", "1e14"], "three or more"),
    (["noise.py", "configs/ladder/public/delphi.csv"], "columns config, base"),
    (["seeds.py", "configs/ladder/third/runs.csv", "--share=2/2"], "I below N"),
    (["surface.py", "configs/ladder/third/runs.csv"], ""),
    (["corpus.py", "--repeats", "--out=nowhere"], "build the corpus first"),
    pytest.param(["speed.py", "none.csv"], "No such file", marks=pytest.mark.slow),
    pytest.param(["copying.py", "none.py"], "none.py", marks=pytest.mark.slow)])
def test_a_script_answers_bad_input_in_one_line(words, message):
    """Each in a process of its own, as users start it: exit code 2, and nothing but that line on stderr."""
    done = subprocess.run([sys.executable, LADDER / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True)
    if not message:
        assert done.returncode == 0 and done.stdout.count("L = ") == 2
        return
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith(f"{words[0]}: ") and message in line


def test_a_table_named_from_the_repositorys_root_is_found_from_anywhere(tmp_path, monkeypatch):
    """As scaling.read_table finds it: noise.py printed no row of it from another folder."""
    monkeypatch.chdir(tmp_path)
    assert len(plan.planned_rows("configs/ladder/third/runs.csv", "width")) == 118


def test_the_interval_of_a_rung_is_that_of_its_own_budgets_seeds():
    """Two budgets whose seeds lie 0.01 and 0.001 apart; one of four seeds in all has none."""
    def points(spread, seeds):
        return [(spread, (1e12, loss + spread * (-1)**i, math.nan)) for loss in (3.0,) for i in range(seeds)]
    both = {"a": points(0.01, 6) + points(0.001, 6), "b": points(0.01, 6) + points(0.001, 2)}
    for spread, seeds in ((0.01, 12), (0.001, 8)):
        deviation, freedom = figures.seed_noise(both, spread)
        assert freedom == seeds - 2 and deviation == pytest.approx(spread * math.sqrt(seeds / (seeds - 2)))
    assert figures.seed_noise({"a": points(0.01, 2), "b": points(0.01, 2)}, 0.01) == (0.0, 0)
    found = figures.speedup([(1e12, 3.0, math.nan)], [(1e12, 2.9, math.nan)], 1.0, 0.1, 0.01, 6)
    low, high = found["compute_interval"]
    half = 1.943 * 0.01 * math.hypot(1 / 2.0, 1 / 1.9) / 0.1       # Student's 95 % quantile of 6 degrees of freedom
    assert math.log(high / low) == pytest.approx(2 * half, rel=1e-3)


def test_runs_whose_attention_is_not_v2_are_marked():
    """They have two layers, which was no full layer when they were trained; V2's last layer is full."""
    for name, row in table("rung_runs", "runs.csv").items():
        assert bool(row["note"]) == name.startswith("f_attention")
        assert not row["note"] or ("not V2" in row["note"] and "--num_layers=2" in row["overrides"])


def test_the_same_config_twice_is_the_same_run():
    """Runs that are in two tables, trained twice: equal to the last digit."""
    ladder, rungs = table("isoflop", "runs.csv"), table("rung_runs", "runs.csv")
    twice = ladder.keys() & rungs.keys()
    assert len(twice) >= 4 and all(ladder[name]["loss"] == rungs[name]["loss"] for name in twice)


def test_every_loss_of_the_pilot_table_is_a_row_of_the_pilot():
    rows = scaling.read_table(LADDER / "pilot.csv")[1]
    assert not any(row["commit"].endswith("dirty") for row in rows) and {row["seed"] for row in rows} == {"100"}
    found = {(label, C): losses for label, C, losses in figures.pilot_table()}
    assert len(found) == len(figures.PILOT) and all(len(losses) >= 2 for losses in found.values())
    assert f"{found['MoE V1, Adam/matrices x', 1.6e12]['8/1']:.3f}" == "3.624"
    assert min(found["MoE V1, Adam/matrices x", 1.6e12], key=found["MoE V1, Adam/matrices x", 1.6e12].get) == "8/1"
    losses = {f"{loss:.12g}" for table in found.values() for loss in table.values()}
    assert losses <= {f"{float(row['loss']):.12g}" for row in rows}


# --------------------------------------------------------------------------------------------- the forecasts

@pytest.mark.parametrize("name", RECORDS)
def test_a_registered_forecast_still_scores(name, tmp_path, monkeypatch, capsys):
    """Records of before this layout: their seal and the hash of their data hold, from any directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(LADDER / "hero" / f"{name}.json", tmp_path)
    [before] = map(json.loads, (LADDER / "hero" / f"{name}.outcomes.jsonl").read_text().splitlines())
    assert scaling.main(["score", f"{name}.json", "--loss", repr(before["loss"])]) == 0
    [after] = map(json.loads, Path(f"{name}.outcomes.jsonl").read_text().splitlines())
    for key in ("record", "loss", "error_percent", "inside"):
        assert after[key] == before[key]
    assert f"{before['error_percent']:+.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(LADDER.glob("third/hero/*.json")), ids=lambda path: path.stem)
def test_a_record_of_the_third_ladder_is_as_it_was_registered(path):
    """Its seal, and the results that it was made from."""
    record = scaling.read_json(path)
    assert record["sha256"] == scaling.seal(record)
    assert record["runs_sha256"] == scaling.data_sha256([ROOT / source for source in record["runs"]])


@pytest.mark.parametrize("name", [*RECORDS, "forecast_3e14", "forecast_9e14", "forecast_9e14_second"])
def test_a_registered_law_is_what_its_table_gives(name):
    hero, runs = ("third/hero", "third") if "e14" in name else ("hero", "isoflop")
    record = scaling.read_json(LADDER / hero / f"{name}.json")
    config = scaling.FitConfig(asymptote=record["choices"]["asymptote"], head=True)
    runs = scaling.checked(scaling.read_csv(LADDER / runs / "runs.csv", True), name)
    law = scaling.fit_law(runs, config).law
    assert [law.E, law.A, law.alpha] == pytest.approx([record["envelope"][key] for key in ("E", "A", "alpha")],
                                                      rel=1e-6)
    assert law.loss(record["target"]["C"]) == pytest.approx(record["forecast"]["loss"], rel=1e-9)


def test_every_outcome_is_drawn_against_its_own_forecast():
    """ladder.png once drew them all against the law of the last record: 0 % where the forecast missed by 2 %."""
    runs = {float(row["loss"]): row for row in table("hero", "runs.csv").values()}
    found = {r["name"]: r for r in figures.forecasts()}
    assert tuple(found) == RECORDS
    for name, r in found.items():
        record = scaling.read_json(LADDER / "hero" / f"{name}.json")
        assert (r["C"], r["forecast"]) == (record["target"]["C"], record["forecast"]["loss"])
        assert r["law"].loss(r["C"]) == pytest.approx(r["forecast"], rel=1e-9)
        assert r["interval"] == record["forecast"]["intervals"]["run_bootstrap"]
        [(loss, error)] = r["outcomes"]
        assert float(runs[loss]["flops_with_head"]) == pytest.approx(r["C"], rel=1e-3)
        assert error == pytest.approx(100 * (loss / r["forecast"] - 1), abs=1e-9)
    assert [round(r["outcomes"][0][1], 2) for r in found.values()] == [-2.18, -1.0, 2.78]


def test_outcomes_of_the_third_ladder_are_those_of_its_runs():
    """Each error is that of a run in third/hero; a record from a run's beginning is scored with that run."""
    rows = {row["loss"]: row for path in sorted((LADDER / "third/hero").glob("runs*.csv"))
            for row in scaling.read_table(path)[1] if row["loss"]}
    found = {r["name"]: r for r in figures.forecasts(LADDER / "third")}
    errors = {name: [round(error, 2) for _, error in r["outcomes"]] for name, r in found.items()}
    assert len(rows) == 3 and errors["forecast_3e14"] == [1.03, 0.67]
    assert errors["forecast_9e14"] == [1.16] and errors["forecast_9e14_second"] == [-0.09]
    for name, r in found.items():
        for loss, error in r["outcomes"]:
            row = rows[repr(loss)]
            assert float(row["flops_with_head"]) == pytest.approx(r["C"], rel=1e-3)
            assert error == pytest.approx(100 * (loss / r["forecast"] - 1), abs=1e-9)
            run = scaling.read_json(LADDER / "third" / "hero" / f"{name}.json")["target"].get("run")
            assert not run or run == plan.run_dir_of(row["overrides"])


def test_a_line_through_smaller_runs_is_as_far_off_at_3e14_as_readme_says(capsys):
    """The end of both runs from their first 10 and 30 %: 2.5 and 1.7 % too high, as a root mean square of two."""
    known = curves.read_curves([LADDER / "third/curves.csv"])
    held = curves.read_curves([LADDER / "third/hero_curves.csv"])
    tables = [str(LADDER / "third" / name) for name in ("runs.csv", "hero/runs.csv")]
    losses = [[float(row["loss"]) for row in curves.rows_of(side, tables)] for side in (known, held)]
    for share, percent in ((0.1, 2.5), (0.3, 1.7)):
        off = [100 * (1 - loss / curves.heldout_end(curve, known, losses[0], share))
               for curve, loss in zip(held, losses[1])]
        assert min(off) > 0 and np.sqrt(np.mean(np.square(off))) == pytest.approx(percent, abs=0.05)
        assert math.isnan(curves.error_of(known, losses[0], [1e13] * 6 + [3e13] * 14, share))


def test_the_picture_shows_those_errors():
    """The stars of the drawn panels, read back from the axes."""
    plt, records = scaling.pyplot(), figures.forecasts()
    optima = figures.ladder_fit(draws=1)["fit"].optima
    drawn, (errors, laws) = plt.subplots(1, 2)
    figures.draw_errors(errors, records)
    figures.draw_registered(laws, records, optima)
    stars = [[line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "*"]
             for ax in (errors, laws)]
    assert stars[0] == [[i, error] for i, r in enumerate(records) for _, error in r["outcomes"]]
    assert stars[1] == [[r["C"], loss] for r in records for loss, _ in r["outcomes"]]
    plt.close(drawn)


# ---------------------------------------------------------------------------------------------- the commands

def planted(folder, gains=(1.0, 1.5, 4.0), noise=0.001):
    """A ladder folder as the runs would leave it, from L = 2 + A/N^a + B/D^b and rungs of known speed-up."""
    rng = np.random.default_rng(1)
    rows, k = ["config,flops,flops_with_head,params,tokens,loss,bpb,seed,eval"], 8.0
    for C in (2e11, 5e11, 1.1e12, 2.6e12, 6.4e12):
        for N in np.geomspace(0.25, 4, 6) * 0.05 * C**0.5:
            D = C / k / N
            loss = 2 + 30 / N**0.3 + 60 / D**0.3 + noise * rng.normal()
            rows.append(f"c_moe_v1_c{C:g}_d{N:.0f},{C / 2},{C},{N},{D},{loss},1,0,e")
    (folder / "isoflop").mkdir(parents=True)
    (folder / "isoflop" / "runs.csv").write_text("\n".join(rows) + "\n")
    alpha, A, rungs, speed = 0.15, 400.0, [rows[0]], ["config,flops_per_second"]
    for name, gain in zip(("a_one", "b_two", "c_three"), gains):
        for C in (2e11, 7e11, 2.1e12, 6.4e12):
            speed.append(f"{name}_c{C:g}_d32,{1e9 / (gain - 0.2)}")
            for seed in (0, 1):
                loss = 2 + A * (C * gain)**-alpha + noise * rng.normal()
                end = f"_s{seed}" if seed else ""
                rungs.append(f"{name}_c{C:g}_d32{end},{C / 2},{C},{C**0.5:.0f},{C**0.5},{loss},1,{seed},e")
    (folder / "rung_runs").mkdir()
    (folder / "rung_runs" / "runs.csv").write_text("\n".join(rungs).replace("+", "") + "\n")
    (folder / "rung_runs" / "speed.csv").write_text("\n".join(speed).replace("+", "") + "\n")
    return 2.0, alpha


def test_figures_recompute_everything_from_the_tables(tmp_path):
    E, alpha = planted(tmp_path)
    law, tables = figures.rung_results(tmp_path)
    assert (law.E, law.alpha) == (pytest.approx(E, abs=0.1), pytest.approx(alpha, rel=0.05))
    table = tmp_path / "rung_runs" / "runs.csv"
    for by_budget, gain in zip(tables[table].values(), (1.0, 1.5, 4.0)):
        assert len(by_budget) == 4
        for key, true in (("compute", gain), ("wall_clock", gain / (gain - 0.2) * 0.8)):
            assert np.exp(np.mean([np.log(found[key]) for found in by_budget.values()])) == pytest.approx(true, rel=0.05)
        for found in by_budget.values():
            low, high = found["compute_interval"]
            assert low < gain * 1.02 and high > gain / 1.02 and high / low < 1.2
            assert found["compute"] == pytest.approx(gain, rel=0.1)
            assert found["wall_clock"] == pytest.approx(gain / (gain - 0.2) * 0.8, rel=0.1)
    (tmp_path / "rung_runs" / "speed.csv").unlink()
    rungs = figures.rung_table(figures.rung_points(table), law)
    assert rungs["b_two"][2e11]["wall_clock"] is None
    assert scaling.main(["figures", str(tmp_path), "--draws", "20"]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"ladder.png", "rungs.png"}
    words = f"--count-head --target 6.4e13 --draws 20 --out {tmp_path / 'hero' / 'one.json'}".split()
    assert scaling.main(["register", str(tmp_path / "isoflop" / "runs.csv"), *words]) == 0
    assert figures.forecasts(tmp_path)[0]["outcomes"] == []
    observed = figures.forecasts(tmp_path)[0]["forecast"] * 1.001
    assert scaling.main(["score", str(tmp_path / "hero" / "one.json"), "--loss", repr(observed)]) == 0
    assert figures.forecasts(tmp_path)[0]["outcomes"][0][1] == pytest.approx(0.1)
    (tmp_path / "ladder.png").unlink()
    assert scaling.main(["figures", str(tmp_path), "--draws", "20"]) == 0
    assert (tmp_path / "ladder.png").stat().st_size > 20_000


def test_the_markdown_tables_are_printed_from_the_tables(capsys):
    """The published numbers of the ladder; README pastes what this prints."""
    assert scaling.main(["figures", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in ("| `forecast_10x` | 9.1e13 | E = 0.82 | 2.2899 | 2.2432 to 2.3544 | 2.2400 | -2.18 %, outside |",
                  "| `forecast_30x` | 2.7e14 | E = 0.82 | 2.0865 | 2.0390 to 2.1509 | 2.0657 | -1.00 %, inside |",
                  "| 9e+12 | 6 | 5.62e+06 | 2.40e+05 | 2.831 |", "D* grows as C^0.593 (0.460 to 0.726).",
                  "| MuonH | 3.943, 1.20, 0.50 | 3.630, 1.34, 0.56 | 3.233, 1.68, 0.68 | 2.910, 2.13, 0.87 | "
                  "2.667, 2.71, 1.16 | 2.984, 2.09"):
        assert any(line.startswith(start) for line in lines), start
    with open(LADDER / "rung_runs" / "runs.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["config"].startswith("b_dense_adamh_c9e12")]
    mean = sum(float(row["loss"]) for row in rows) / len(rows)
    assert len(rows) == 2 and any(line.startswith("| dense, AdamH | 4.041, ") and f"| {mean:.3f}, " in line
                                  for line in lines)


# ------------------------------------------------------------------------- noise, curves, one family

def synthetic_curve(law, steps, decay, noise=0.0, seed=0):
    """A Curve that obeys a law: a warm-up of a tenth, then down to zero in the last share `decay`."""
    share = np.arange(1, steps + 1) / steps
    rates = 0.02 * np.minimum(1, share / 0.1) * np.minimum(1, (1 - share) / decay)
    at = np.arange(50, steps + 1, 50)
    blank = curves.Curve(f"{steps} steps", at.astype(float), rates[at - 1], np.zeros(len(at)), steps)
    loss_R = law.loss_R(curves.rates_of(blank), curves.middle_R(blank))
    loss_R = loss_R + noise * np.random.default_rng(seed).standard_normal(len(at))
    return curves.Curve(blank.run, blank.step_R, blank.rate_R, loss_R, steps)


@pytest.mark.parametrize("law", [
    curves.CurveLaw("annealing", 1.5, 2.0, 0.02, (0.5,)),
    pytest.param(curves.CurveLaw("multipower", 1.5, 2.0, 30.0, (0.5, 1.5, 0.6, 0.5)), marks=pytest.mark.slow)])
def test_a_law_of_training_curves_finds_its_truth_and_another_schedule(law):
    known = [synthetic_curve(law, 3000, 0.9), synthetic_curve(law, 2000, 1e-9)]
    held = synthetic_curve(law, 4000, 0.2)
    found = curves.fit_curves(known, law.name)
    assert found.E == pytest.approx(law.E, abs=2e-3) and found.A == pytest.approx(law.A, rel=2e-3)
    got = found.loss_R(curves.rates_of(held), curves.middle_R(held))
    np.testing.assert_allclose(got, held.loss_R, atol=2e-3)
    noisy = [synthetic_curve(law, 3000, 0.9, 0.01), synthetic_curve(law, 2000, 1e-9, 0.01, 1)]
    assert curves.fit_curves(noisy, law.name).error == pytest.approx(0.01, rel=0.2)


def test_curves_of_one_shape_collapse_at_their_e_and_tell_the_end_from_the_beginning():
    law = curves.CurveLaw("annealing", 0.0, 3.0, 0.01, (0.5,))
    shape = synthetic_curve(law, 3000, 0.9)
    def scaled(E, size, name):
        return curves.Curve(name, shape.step_R, shape.rate_R, E + size * shape.loss_R, shape.steps)
    family = [scaled(1.2, size, str(size)) for size in (1.0, 0.8, 0.6)]
    assert curves.collapse_E(family) == pytest.approx(1.2, abs=0.01)
    assert curves.spread(family, 0.0) > 20 * curves.spread(family, 1.2)
    held = scaled(1.2, 0.45, "held")
    begun = curves.Curve("begun", *(x[:18] for x in (held.step_R, held.rate_R, held.loss_R)), held.steps)
    assert curves.end_of(begun, family, 1.2, 0.3) == pytest.approx(curves.final_loss(held), rel=2e-3)
    with pytest.raises(scaling.BadInput, match="3 rows between 2% and 5%"):
        curves.end_of(begun, family, 1.2, 0.05)


def test_the_gap_weighs_held_out_domains_as_training_does(monkeypatch, capsys):
    """The two runs at 3e14, from their rows and the last 5 % of their curves."""
    monkeypatch.chdir(ROOT)
    rows = [row for row in table("third/hero", "runs.csv").values() if row["width"] == "184"]
    held = np.mean([0.75 * float(row["loss_code"]) + 0.1 * float(row["loss_docs"]) + 0.15 * float(row["loss_books"])
                    for row in rows])
    ends = [float(row["loss"]) for row in scaling.read_table(LADDER / "third/hero_curves.csv")[1]
            if int(row["step"]) > 0.95 * 12846]
    assert scaling.main(["curves", str(LADDER / "third/hero_curves.csv"), "--gap", "--ladder",
                         str(LADDER / "third/hero/runs.csv")]) == 0
    assert capsys.readouterr().out == (f"third, 3e+14, width 184, 2 seeds: training {np.mean(ends):.3f}, held out {held:.3f}, "
                                       f"gap {held - np.mean(ends):.3f}\n")
    assert scaling.main(["curves", str(LADDER / "third/hero_curves.csv"), "--gap"]) == 2


def test_a_run_that_goes_on_is_forecast_held_out_and_the_record_is_scored(tmp_path, capsys):
    """Planted: five curves in proportion, whose held-out loss is 1.1 of the final one to the power 0.9."""
    law = curves.CurveLaw("annealing", 0.0, 3.0, 0.01, (0.5,))
    shape = synthetic_curve(law, 3000, 0.9)
    rng, runs, rows = np.random.default_rng(0), [], []
    for name, size in (("a", 1.0), ("b", 0.85), ("c", 0.7), ("d", 0.6), ("e", 0.5), ("held", 0.4)):
        stop = 18 if name == "held" else 60
        loss_R = size * shape.loss_R + 1e-3 * rng.standard_normal(60)
        held_out = 1.1 * (size * curves.final_loss(shape))**0.9
        runs += [dict(run=f"out/{name}", step=int(step), steps=3000, rate=rate, loss=loss)
                 for step, rate, loss in [*zip(shape.step_R, shape.rate_R, loss_R)][:stop]]
        rows.append(dict(config=name, base="b.py", overrides=f"--run_dir=out/{name}", planned_flops=1e12 / size,
                         width="32", note="", loss=held_out if name != "held" else "", eval="text", bytes_per_token=2.3,
                         flops=1e12))
    table, ladder, record = tmp_path / "curves.csv", tmp_path / "runs.csv", tmp_path / "hero" / "stage.json"
    record.parent.mkdir()
    for path, lines in ((table, runs), (ladder, rows)):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    parts = [tmp_path / f"{name}.csv" for name in ("known", "held")]
    text = table.read_text().splitlines(True)
    parts[0].write_text("".join(line for line in text if "held" not in line))
    parts[1].write_text("".join(line for line in text if "held" in line or line.startswith("run,")))
    words = ["curves", str(parts[0]), "--hold", str(parts[1]), "--until=0.3", "--count-head"]
    assert scaling.main([*words, f"--ladder={ladder}", "--target=3e14", f"--register={record}"]) == 0
    locked = json.loads(record.read_text())
    low, high = locked["forecast"]["intervals"]["each budget from the others, 95 %"]
    assert locked["forecast"]["loss"] == pytest.approx(held_out, rel=2e-3) and low < held_out < high < 1.02 * low
    assert scaling.main(["score", str(record), f"--loss={held_out}"]) == 0
    run = tmp_path / "run"                      # its C counts the head, as --count-head said
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "result.json").write_text(json.dumps(dict(flops=2e14, flops_with_head=3e14, params=1e6, tokens=3e7, seed=0,
                                                     loss=held_out, bpb=1, bytes_per_token=2.3, eval="text")))
    assert scaling.main(["score", str(record), f"--run={run}"]) == 0
    assert capsys.readouterr().out.count("inside  each budget from the others") == 2
    found, = figures.forecasts(tmp_path)
    assert found["form"] == "curve, first 30%" and len(found["outcomes"]) == 2 and found["interval"] == [low, high]
    assert scaling.main([*words, f"--ladder={ladder}", "--target=3e14", f"--register={record}"]) == 2
    assert "exists" in capsys.readouterr().err
    for wrong in ([*words, f"--register={record}2"], [*words[:2], f"--ladder={ladder}"],
                  [*words, "--collapse", f"--ladder={ladder}"], words, [words[0], str(parts[1]), "--collapse"]):
        assert scaling.main(wrong) == 2
    parts[0].write_text(parts[0].read_text().replace(",0.0", ",0.1", 1))
    assert scaling.main(["score", str(record), f"--loss={held_out}"]) == 2, "the curves are part of what was read"
    ladder.write_text(ladder.read_text().replace("out/c", "out/other"))
    capsys.readouterr()
    assert scaling.main([*words, f"--ladder={ladder}"]) == 2
    assert "a row with a loss for every run, found none for out/c" in capsys.readouterr().err


def test_a_curve_is_read_from_a_run_whose_last_line_is_torn(tmp_path):
    rows = [dict(step=10 * i, lr=0.01, mean_loss=5.0 - 0.1 * i) for i in range(1, 11)]
    text = train.json_lines(rows) + '{"step": 110, "lr"'
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 200}}))
    curve = curves.read_curve(tmp_path)
    assert curve.step_R.tolist() == [row["step"] for row in rows] and curve.steps == 200
    assert curves.final_loss(curve) == pytest.approx(4.0)


def test_what_the_widths_of_a_seed_share_is_told_from_what_each_has_of_its_own():
    """Planted: 0.8 % shared, 0.3 % of each run's own, five widths of 200 seeds, the last without the first 100."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.008, 200)
    widths = [dict(enumerate(level * (1 + common + rng.normal(0, 0.003, 200)))) for level in (4, 3.9, 3.8, 3.9, 4.1)]
    widths[-1] = {seed: loss for seed, loss in widths[-1].items() if seed >= 100}
    assert noise_study.shared(widths) == pytest.approx(0.8, rel=0.1)
    assert noise_study.pooled([[*w.values()] for w in widths]) == pytest.approx(math.hypot(0.8, 0.3), rel=0.1)
    own = [dict(enumerate(4 + rng.normal(0, 0.01, 200))) for _ in range(5)]
    assert noise_study.shared(own) < 0.05 and noise_study.shared(own[:1]) == 0


def test_the_noise_of_a_forecast_by_arithmetic_is_that_of_many_ladders():
    budgets, target, noise = np.geomspace(3e11, 3e13, 5), 3e14, 0.1
    truth = scaling.Law(E=0.82 / 2.65, A=(1e12)**0.103, alpha=0.103)
    rng = np.random.default_rng(0)
    for E, free in ((None, True), (truth.E, False)):
        ends = []
        for _ in range(300):
            L = truth.loss(budgets) * (1 + noise / 100 * rng.standard_normal(5))
            ends.append(scaling.loss_law(budgets, L, E).loss(target))
        want = noise_study.forecast_deviation(budgets, noise, target, truth.E, 0.103, free)
        assert 100 * np.std(ends) / truth.loss(target) == pytest.approx(want, rel=0.15)


def test_seeds_of_one_run_are_told_from_other_runs():
    row = dict(base="configs/a.py", planned_flops="1e12", width="32")
    rows = [row | dict(config=f"a_{steps}" + f"_s{seed}" * (seed > 0), loss=loss,
                       overrides=f"--steps={steps} --seed={seed} --run_dir=out/{steps}{seed}")
            for steps, seed, loss in ((10, 0, "2.0"), (10, 1, "2.02"), (20, 0, "3.0"), (10, 2, ""))]
    (group,) = noise_study.seed_spread(rows)
    assert group == (1e12, 32, "a_10", {0: 2.0, 1: 2.02})
    assert noise_study.deviation([*group[3].values()])[0] == pytest.approx(100 * 0.02 / 2**0.5 / 2.01)


def test_a_setting_is_compared_with_the_runs_of_the_same_seeds():
    def row(loss, *words, seed=0):
        overrides = " ".join(["--hidden_dim=32", *words, f"--run_dir=out/{loss}", *[f"--seed={seed}"] * (seed > 0)])
        return dict(base="b", overrides=overrides, planned_flops="3e11", width="32", loss=loss and str(loss))
    base = [row(4.0), row(5.0, seed=1), row("", seed=2)]
    others = [row(4.04, "--beta2=0.9"), row(5.15, "--beta2=0.9", seed=1), row(9.0, "--beta2=0.9", seed=2),
              row(1.0, "--beta2=0.9", "--clip=1"), row(2.0, "--clip=1")]
    assert noise_study.against(base, others) == [
        (3e11, 32, "--beta2=0.9", 2, pytest.approx(2.0)), (3e11, 32, "--clip=1", 1, pytest.approx(-50.0))]


def test_a_row_that_repeats_tells_every_token_of_its_second_half():
    class Mixture:
        heldout = {"one": type("S", (), {"read": lambda self, at, count: np.arange(50)})()}
        tokenizer = type("T", (), {"eot": 7})()
    tokens, targets = copying.repeated_rows(Mixture, 3, 8)
    assert tokens.shape == targets.shape == (3, 16) and tokens.dtype == targets.dtype == np.int32
    assert (tokens[:, :8] == tokens[:, 8:]).all() and (targets[:, :-1] == tokens[:, 1:]).all()
    assert 7 not in tokens and len(np.unique(tokens)) > 8


def test_every_model_of_the_third_ladder_has_the_same_kinds_of_layers():
    rule = plan.Rule(batch=16, head=True, layers=2, heads=2, group=1, unit=8)
    widths, config = plan.widths_of("configs/ladder/third.py", rule)
    assert [keys["hidden_dim"] for keys, _ in widths[:4]] == [8, 16, 24, 32]
    flops = np.array([flops for _, flops in widths])
    for keys, _ in widths[:30]:
        c = dataclasses.replace(config, **keys)
        assert [model.sees_all(c, i) for i in range(c.num_layers)] == [False, True]
        assert (2 * c.head_dim, c.num_heads, c.num_kv_heads) == (max(64, c.hidden_dim), 2, 2)
        assert c.expert_dim * 2 == c.hidden_dim == c.shared_dim
    assert (np.diff(flops, 2)[:30] > 0).all(), "FLOPs grow without a jump"


@pytest.mark.slow
def test_seeds_py_fills_a_table_as_train_py_does(tmp_path):
    """Two seeds of a shape in one process, and train.py for one of them: equal losses, and the same columns."""
    (tmp_path / "t.txt").write_text("the cat sat on the mat and looked at the hat. " * 400)
    (tmp_path / "c.py").write_text(
        f"mixture = (({str(tmp_path / 't.txt')!r}, 1.0),)\ntokenizer = 'bytes'\nvocab_size = 257\nseq_len = 32\n"
        "hidden_dim = 16\nnum_layers = 2\nnum_heads = num_kv_heads = 1\nhead_dim = 16\nshared_dim = 16\nnum_experts = 4\n"
        "experts_per_token = 2\nexpert_dim = 8\ngated_norm_rank = 4\nsteps = 12\nbatch_size = 4\n"
        "sample_tokens = 0\nlog_every = 1\n")
    rows = [{"config": f"c_s{seed}", "base": str(tmp_path / "c.py"), "planned_flops": "1e9", "width": "16", "loss": "",
             "overrides": f"--steps=10 --data_dir={tmp_path}/data --seed={seed} --run_dir={tmp_path}/run{seed}"}
            for seed in (0, 1)]
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    plan.write_table(ours, [*rows[0]], rows)
    plan.write_table(theirs, [*rows[0]], rows[1:])
    assert seeds.main([str(ours), f"--curves={tmp_path}/curves.csv"]) == 0
    plan.run_ladder(theirs)
    (_, second), (there,) = curves.read_curves([tmp_path / "curves.csv"]), curves.read_curves([tmp_path / "run1"])
    for key in ("step_R", "rate_R", "loss_R", "steps"):
        np.testing.assert_allclose(getattr(second, key), getattr(there, key), 1e-5)
    assert second.run == there.run
    (one, two), (other,) = scaling.read_table(ours)[1], scaling.read_table(theirs)[1]
    same = ("loss", "bpb", "flops", "flops_with_head", "params", "total_params", "tokens", "bytes_per_token", "seed", "eval")
    assert {key: two[key] for key in same} == {key: other[key] for key in same} and one["loss"] != two["loss"]
    before = ours.read_bytes()
    assert seeds.main([str(ours)]) == 0 and ours.read_bytes() == before

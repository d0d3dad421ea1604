"""bench/cost_growth.py: fits find the exponents that data was made with, predictions count real bytes, a run goes on where it stopped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cost_growth
import growth_predict
from communication import Decoder
from growth_fit import growth, nonnegative, offset, power
from growth_models import FROZEN, OURS, PEFT, Models, Point, check_changes

import adaptlora
from adaptlora.benchmarks.accuracy import WrongResultError

SMALL = Decoder("small", layers=2, hidden=16, intermediate=24, kv=8, vocabulary=40)
SIZES = 2.0 ** np.arange(9)


def noisy(y, seed=0, relative=0.02):
    return y * np.exp(relative * np.random.default_rng(seed).standard_normal(len(y)))


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0])
def test_slope_of_a_power(k):
    fits = [growth(SIZES, noisy(3 * SIZES**k, seed)) for seed in range(20)]
    for name in ("slope", "upper"):
        found = [getattr(fit, name) for fit in fits]
        assert abs(np.mean([f.k for f in found]) - k) < 0.01
        # Standard errors are as large as the scatter that they stand for.
        assert 0.5 < np.std([f.k for f in found]) / np.mean([f.error for f in found]) < 2
    assert abs(fits[0].slope.c - 3) < 0.2 and fits[0].upper.error > fits[0].slope.error


@pytest.mark.parametrize(("a", "b", "k"), [(10, 0.3, 1.0), (5, 0.01, 1.5), (100, 1, 1.0), (0, 2, 0.5)])
def test_exponent_under_a_constant(a, b, k):
    fits = [growth(SIZES, noisy(a + b * SIZES**k, seed)) for seed in range(20)]
    found = [fit.growing for fit in fits]
    assert abs(np.mean([f.k for f in found]) - k) < 0.03
    assert 0.4 < np.std([f.k for f in found]) / np.mean([f.error for f in found]) < 2.5
    assert np.mean([f.share for f in found]) == pytest.approx(b * (256**k - 1) / (a + b * 256**k), rel=0.03)
    assert found[0](256.0) == pytest.approx(a + b * 256**k, rel=0.05)
    if a:  # the line is too flat, its upper half less so
        assert all(fit.slope.k < fit.upper.k < k for fit in fits)


def test_a_constant_has_no_exponent():
    fits = [growth(SIZES, noisy(np.full(9, 7.0), seed)) for seed in range(20)]
    assert all(fit.growing is None and abs(fit.slope.k) < 0.015 for fit in fits)


def test_what_fits_refuse():
    with pytest.raises(ValueError, match=r"fit: n and y must be lists of one length, got shapes \(3,\) and \(2,\)"):
        power([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"fit: n must hold at least 5 different sizes, got \[1.0, 2.0\]"):
        offset([1, 2, 2, 1, 1], [1, 2, 2, 1, 1])
    with pytest.raises(ValueError, match=r"fit: y must be positive and finite, got \[1.0, 0.0, 3.0\]"):
        growth([1, 2, 3], [1, 0, 3])


def test_coefficients_are_not_negative():
    columns = np.stack([np.ones(9), SIZES, SIZES**2, np.zeros(9)], 1)
    coefficients, left = nonnegative(columns, columns @ [4, 0, 1e-3, 0])
    np.testing.assert_allclose(coefficients, [4, 0, 1e-3, 0], atol=1e-9)
    assert left < 1e-20
    coefficients, _ = nonnegative(columns, 100 - 0.1 * SIZES)
    assert (coefficients >= 0).all() and coefficients[1] == 0


def counted(adapter, optimizer) -> dict[str, int]:
    """Numbers and bytes of the tensors themselves."""
    factors = list(adapter.factors())
    moments = [t for factor in factors for t in optimizer.state[factor].values() if t.dim()]
    return {
        "parameters": sum(f.numel() for f in factors),
        "factors": sum(f.untyped_storage().nbytes() for f in factors),
        "gradients": sum(f.grad.untyped_storage().nbytes() for f in factors),
        "optimizer": sum(t.untyped_storage().nbytes() for t in moments),
    }


def test_predicted_bytes_are_those_of_a_real_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    normal = adaptlora.NormALConfig(r=8, target_r=3, target_modules=r".*_proj", t_p=1, t_c=2)
    adapter = adaptlora.attach(LlamaForCausalLM(config), normal)
    optimizer = torch.optim.AdamW(adapter.parameters())
    adapter.track(optimizer)
    ids = torch.randint(0, 40, (2, 5))
    for step in range(3):
        (adapter.model(input_ids=ids, labels=ids).loss + adapter.penalty()).backward()
        optimizer.step()
        if step == 0:
            assert counted(adapter, optimizer) == growth_predict.held(SMALL, 8)
        adapter.step()
        if step < 2:
            optimizer.zero_grad()
    ranks = adapter.ranks()
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 3 * len(ranks)
    assert counted(adapter, optimizer) == growth_predict.held(SMALL, ranks)


def made_up(point: Point, quick: bool) -> dict:
    """A row as `measured` gives it, of costs that are exactly of growth_predict's form: two products, and so much for a module."""
    numbers = 2 * point.rank * point.modules * point.width
    step = point.modules * 1e-2 + point.tokens * (1e-8 * point.modules * point.width**2 + 3e-8 * numbers)
    frozen = point.modules * 1e-2 + point.tokens * 1e-8 * point.modules * point.width**2
    simple = {"penalty": 0.1 + 1e-6 * numbers, "rank change": 0.02 * point.modules + 1e-6 * (numbers // 2)}
    times = {"step": {FROZEN: frozen, PEFT: 2 * step, OURS: step}}
    times |= {name: {PEFT: 3 * y, OURS: y} for name, y in simple.items() if name == "penalty" or point.rank > 1}
    triples = {q: {p: [0.9 * y, y, 1.1 * y] for p, y in of.items()} for q, of in times.items()}
    held = {FROZEN: 4 * point.tokens, PEFT: 16 * numbers + 999, OURS: 16 * numbers + 999}
    return {"point": vars(point), "load": 0.0, "ms": triples, "bytes": held}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_growth, "measured", made_up)
    return tmp_path / "folder" / "cost_growth.json"


def test_a_run_goes_on_where_it_was_stopped(results, monkeypatch):
    asked = []

    def stopped(point, quick):
        asked.append(point)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return made_up(point, quick)

    monkeypatch.setattr(cost_growth, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        cost_growth.measure(results, quick=True, say=lambda text: None)
    assert len(json.loads(results.read_text())["points"]) == 3
    content = cost_growth.measure(results, quick=True, say=lambda text: None)
    wanted = cost_growth.points(quick=True)
    # The fourth is asked for twice, for the first time in vain, and none else is.
    assert asked == [*wanted[:4], *wanted[3:]]
    assert [Point(**row["point"]) for row in content["points"]] == wanted
    assert cost_growth.measure(results, quick=True) == json.loads(results.read_text()) == content
    assert len(asked) == len(wanted) + 1


def test_foreign_results_are_refused_and_stay(results, monkeypatch, capsys):
    def refused(text, *options):
        results.parent.mkdir(exist_ok=True)
        results.write_text(text)
        monkeypatch.setattr(sys, "argv", ["cost_growth.py", "--quick", "--results", str(results), *options])
        assert cost_growth.main() == 2 and results.read_text() == text
        return " ".join(capsys.readouterr().err.split())

    monkeypatch.setattr(sys, "argv", ["cost_growth.py", "--table", "--results", str(results)])
    assert cost_growth.main() == 2 and "must be there: run without --table" in " ".join(capsys.readouterr().err.split())
    assert "must be JSON that cost_growth wrote" in refused("# notes")
    assert "must be results with benchmark 'cost_growth', got None" in refused('{"points": []}', "--table")
    assert "got 'list'" in refused("[]")
    assert "must have environment, a dict, got None" in refused('{"benchmark": "cost_growth"}')
    here = cost_growth.resumed(results.with_name("new.json"), quick=True)
    assert "must be complete" in refused(json.dumps(here), "--table")
    assert "must have point, ms and bytes of each point, got 3" in refused(json.dumps(here | {"points": [3]}))
    row = made_up(Point(), quick=True)
    assert "must have points with ['rank', " in refused(json.dumps(here | {"points": [row | {"point": {"rank": 1}}]}))
    assert "must have been measured with this settings" in refused(json.dumps(here | {"settings": {"base": {}}}))
    other = here | {"environment": here["environment"] | {"machine": {"cpu": "abacus"}}}
    assert "must have been measured with this machine" in refused(json.dumps(other))
    results.write_bytes(b"\xff\xfe")
    assert cost_growth.main() == 2 and results.read_bytes() == b"\xff\xfe"
    assert "must be JSON that cost_growth wrote" in " ".join(capsys.readouterr().err.split())
    # How busy the machine was is no reason.
    busy = here | {"environment": here["environment"] | {"load_before": 99.0}}
    results.write_text(json.dumps(busy))
    assert cost_growth.resumed(results, quick=True)["points"] == []


def test_fresh_results_replace_old_ones_when_there_is_a_point(results, monkeypatch):
    results.parent.mkdir()
    results.write_text("old")
    asked = []

    def stopped(point, quick):
        asked.append(results.read_text() == "old")
        if len(asked) == 2:
            raise KeyboardInterrupt
        return made_up(point, quick)

    monkeypatch.setattr(cost_growth, "measured", stopped)
    monkeypatch.setattr(sys, "argv", ["cost_growth.py", "--quick", "--fresh", "--results", str(results)])
    with pytest.raises(KeyboardInterrupt):
        cost_growth.main()
    assert asked == [True, False] and len(json.loads(results.read_text())["points"]) == 1


def test_whole_run_fits_predicts_draws_and_prints(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost_growth.py", "--quick", "--results", str(results)])
    assert cost_growth.main() == 0
    printed = capsys.readouterr().out
    content = json.loads(results.read_text())
    by_series = {(row["quantity"], row["axis"], row["provider"]): row for row in content["fits"]}
    assert len(by_series) == 4 * (3 + 3 + 2 + 2)
    for quantity, axis, k in (("step", "modules", 1), ("step", "width", 2), ("memory", "rank", 1)):
        row = by_series[quantity, axis, FROZEN if quantity == "step" else OURS]
        assert row["growing"][0] == pytest.approx(k, abs=0.02)
    assert "growing" not in by_series["step", "rank", FROZEN]
    # Costs of the model's form are found again, at any distance.
    shapes = growth_predict.DECODER.linears()
    numbers, weights = sum(4 * (K + N) for K, N in shapes.values()), sum(K * N for K, N in shapes.values())
    row = next(r for r in content["predictions"]["times_here"] if (r["start"], r["average"]) == (8, 4))
    expected = 1e-3 * (560 * 1e-2 + 4096 * (1e-8 * weights + 3e-8 * numbers))
    found = row[f"step, {OURS}"]
    assert found["seconds"] == pytest.approx(expected, rel=1e-3) and found["factor"] == pytest.approx(1, abs=0.01)
    most = max(r["ms"]["step"][OURS][1] for r in content["points"]) / 1e3
    assert found["decades"] == pytest.approx(np.log10(expected / most), abs=1e-3)
    for average in (4, 2):  # what stays is moved, not what goes
        row = next(r for r in content["predictions"]["times_here"] if (r["start"], r["average"]) == (8, average))
        moved = 3e-3 * (560 * 0.02 + 1e-6 * numbers * average / 4)
        assert row[f"rank change, {PEFT}"]["seconds"] == pytest.approx(moved, rel=1e-3)
    assert printed.count("not measured") == 4 and "| 8 → 4 |" in printed
    unchanged = [line for line in printed.splitlines() if line.startswith("| 8 | ")]
    assert [line.count(" – |") for line in unchanged] == [
        0,
        0,
        2,
        1,
    ]  # the change's columns, of times here and on an H100
    with Image.open(results.with_suffix(".png")) as image:
        image.verify()
    monkeypatch.setattr(sys, "argv", ["cost_growth.py", "--table", "--results", str(results)])
    assert cost_growth.main() == 0 and capsys.readouterr().out == printed


def test_measured_point(monkeypatch):
    row = cost_growth.measured(Point(rank=4, modules=2, tokens=8, width=16), quick=True)
    assert {name: set(of) for name, of in row["ms"].items()} == {
        name: set(cost_growth.PROVIDERS[name]) for name in ("step", "penalty", "rank change")
    }
    assert all(0 < low <= median <= high for of in row["ms"].values() for low, median, high in of.values())
    # Factors, moments and gradients of 2 · 4 · 32 numbers, and x of the second module.
    assert all(row["bytes"][provider] >= 16 * 2 * 4 * 32 + 4 * 8 * 16 for provider in (PEFT, OURS))
    assert 0 < row["bytes"][FROZEN] < row["bytes"][OURS]
    changes = Models(Point(rank=4, modules=2, tokens=8, width=16)).rank_changes()
    names = list(changes[OURS].pairs)
    for title, change in changes.items():
        for i in range(6):  # each of both factors and their moments

            def wrong(name, rows=change.rows, i=i):
                return [part + (j == i and len(part) == 2) for j, part in enumerate(rows(name))]

            with monkeypatch.context() as patch:
                patch.setattr(change, "rows", wrong)
                with pytest.raises(WrongResultError, match=f"{title}: layers.0 does not keep its first 2 vectors"):
                    check_changes(changes, names, 2)
    first = cost_growth.measured(Point(rank=1, modules=2, tokens=8, width=16), quick=True)
    assert "rank change" not in first["ms"]

"""adaptlora inspect of spectra and of two adapters: numbers as of the dense ΔW, pictures, what does not fit together."""

import json
import math
from pathlib import Path

import pytest
import torch
from adapter_folders import factors, stack, write
from command_line import elsewhere, invoke  # noqa: F401 - one is a fixture
from PIL import Image
from safetensors.torch import save_file

from adaptlora.inspection import compare, inspect_adapter, page_data, pictures, save_pictures, spectra
from adaptlora.rank_history import RankHistory

pytestmark = pytest.mark.usefixtures("elsewhere")


def refused(*arguments):
    lines = [line for line in invoke("inspect", *arguments, code=2).stderr.splitlines() if line]
    assert len(lines) == 1
    return lines[0]


def dense(scaling, lora_A, lora_B):
    return scaling * lora_B.double() @ lora_A.double()


def test_spectra_are_those_of_the_scaled_product():
    modules = {"a": factors(5, seed=1), "b": factors(2, K=1, seed=2)}
    found = inspect_adapter(write(Path("x"), modules, alpha_pattern={"b": 3}, use_rslora=True))
    for name, scaling, kept in (("a", 8 / math.sqrt(5), 5), ("b", 3 / math.sqrt(2), 1)):
        values = torch.linalg.svdvals(dense(scaling, *modules[name]))[:kept]
        spectrum = spectra(found)[name]
        assert spectrum.singular_values == pytest.approx(values.tolist(), rel=1e-9)
        assert spectrum.norm == pytest.approx(values.norm().item())
        energy = values.square().cumsum(0) / values.square().sum()
        assert spectrum.rank_90 == 1 + sum(energy < 0.9)
    norms = modules["a"][0].norm(dim=1) + modules["a"][1].norm(dim=0)
    assert found.modules[0].norms == pytest.approx(norms.tolist(), rel=1e-5)


def test_two_adapters_as_their_dense_updates_have_it():
    first, second = {"a": factors(5, seed=1)}, {"a": factors(3, seed=2)}
    result = compare(
        inspect_adapter(write(Path("x"), first)), inspect_adapter(write(Path("y"), second, lora_alpha=2.0))
    )
    (module,) = result.modules
    W1, W2 = dense(8 / 5, *first["a"]), dense(2 / 3, *second["a"])
    assert module.ranks == (5, 3) and module.norms == pytest.approx((W1.norm().item(), W2.norm().item()))
    assert module.cosine == pytest.approx((W1 * W2).sum().item() / (W1.norm() * W2.norm()).item())
    assert module.distance == pytest.approx(((W2 - W1).norm() / W1.norm()).item())
    for overlap, angles, X, Y in (
        (module.overlap_out, module.angles_out, W1, W2),
        (module.overlap_in, module.angles_in, W1.mT, W2.mT),
    ):
        projections = [M @ torch.linalg.pinv(M, rtol=1e-9) for M in (X, Y)]
        assert overlap == pytest.approx((projections[0] @ projections[1]).norm().square().item() / 3)
        assert sum(math.cos(math.radians(angle)) ** 2 for angle in angles) / 3 == pytest.approx(overlap)
        assert len(angles) == 3 and angles == sorted(angles)
    assert result.cosine() == pytest.approx(module.cosine) and result.distance() == pytest.approx(module.distance)


def test_other_factors_of_one_update_are_no_difference_and_a_zero_one_has_no_direction():
    A, B = factors(4, seed=1)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    turned = turn.mT @ A.double(), B.double() @ turn
    first = inspect_adapter(write(Path("x"), {"a": (A.double(), B.double()), "b": (A, B)}))
    second = inspect_adapter(write(Path("y"), {"a": turned, "b": (A, torch.zeros_like(B))}))
    same, zero = compare(first, second).modules
    assert same.cosine == pytest.approx(1) and same.distance < 1e-12 and same.overlap_in == pytest.approx(1)
    assert max(same.angles_out + same.angles_in) < 1e-4
    assert (zero.cosine, zero.overlap_out, zero.angles_in) == (None, None, []) and zero.distance == pytest.approx(1)
    assert compare(second, first).modules[1].distance is None
    assert spectra(second)["b"].rank_90 == 0


def test_a_product_that_no_memory_would_hold():
    size = 200_000
    found = inspect_adapter(write(Path("x"), {"a": factors(2, K=size, N=size)}))
    assert compare(found, found).modules[0].distance < 1e-12


def test_modules_that_only_one_has_are_listed():
    write(Path("x"), {"h.0.q": factors(4), "h.0.[k]": factors(4), "h.1.q": factors(2)})
    write(Path("y"), {"h.0.q": factors(3), "h.1.q": factors(2, K=10), "h.2.q": factors(1)})
    result = compare(inspect_adapter("x"), inspect_adapter("y"))
    assert [module.name for module in result.modules] == ["h.0.q"]
    assert (result.only_first, result.only_second) == (["h.0.[k]"], ["h.2.q"])
    assert result.other_shapes == {"h.1.q": ((9, 12), (9, 10))}
    output = invoke("inspect", "x", "y").output
    for text in ("4 → 3", "-1", "in x only: h.0.[k]", "in y only: h.2.q", "not compared: h.1.q (12→9 and 10→9)"):
        assert text in output
    assert " 0.[k] " in invoke("inspect", "x").output
    write(Path("z"), {"other": factors(1)})
    assert "must have a module of the same name and shape as one of 'x', such as h.0.[k]" in refused("x", "z")


def test_all_together_counts_a_module_that_is_not_there_as_zero():
    q, k, v = ((f"h.{i}.q", factors(2, seed=i)) for i in range(3))
    first = inspect_adapter(write(Path("x"), dict([q, k])))
    second = inspect_adapter(write(Path("y"), dict([q, v])))
    W0, W1, W2 = (dense(8 / 2, *of) for _, of in (q, k, v))
    zero = torch.zeros_like(W0)
    one, other = torch.stack([W0, W1, zero]), torch.stack([W0, zero, W2])
    result = compare(first, second)
    assert result.cosine() == pytest.approx(((one * other).sum() / (one.norm() * other.norm())).item())
    assert result.distance() == pytest.approx(((other - one).norm() / one.norm()).item())
    of = "3 modules, 2 of them in one adapter alone (ΔW = 0 in the other)"
    assert (
        f"cosine {result.cosine():.4f}, distance {result.distance():.4f}, of {of}" in invoke("inspect", "x", "y").output
    )
    together = page_data(result, ["x", "y"])["together"]
    assert ("cosine of all ΔW", f"{result.cosine():.4f}") in together["facts"] and together["notes"] == [
        f"All ΔW: {of}."
    ]
    assert "overlap: 100.0% on average of the 1 modules in both" in invoke("inspect", "x", "--before", "y").output


def test_all_together_leaves_out_what_is_not_known():
    def tensors(name, lora_A, lora_B):
        return {f"lora_unet_{name}.lora_down.weight": lora_A, f"lora_unet_{name}.lora_up.weight": lora_B}

    plain = {**tensors("q", *factors(2)), **tensors("k", *factors(2, seed=1))}
    save_file({name: tensor + 0 for name, tensor in plain.items()} | tensors("v", *factors(2)), "first.safetensors")
    dora = {"lora_unet_k.dora_scale": torch.ones(12), **tensors("v", *factors(2, K=5))}
    save_file(plain | dora, "second.safetensors")
    result = compare(inspect_adapter("first.safetensors"), inspect_adapter("second.safetensors"))
    assert result.only_first == ["lora_unet_k"] and result.uncounted() == ["lora_unet_v", "lora_unet_k"]
    assert result.cosine() == pytest.approx(1) and result.distance() < 1e-12
    output = invoke("inspect", "first.safetensors", "second.safetensors").output
    assert "of 1 modules; 2 not compared" in output and "second.safetensors: left out: lora_unet_k: " in output


def test_both_adapters_say_what_is_left_out(monkeypatch):
    for folder in ("x", "y"):
        write(Path(folder), {"h.0.q": factors(2)}, use_dora=folder == "y")
    note = "ΔW is taken as scaling · B A alone: use_dora"
    assert f"y: {note}" in invoke("inspect", "x", "y").output and note not in invoke("inspect", "x", "x").output
    assert f"before: {note}" in invoke("inspect", "x", "--before", "y").output
    assert invoke("inspect", "y", "--before", "x").output.count(note) == 1
    titles = drawn(monkeypatch, compare(inspect_adapter("x"), inspect_adapter("y")), ["one", "two"])[0]
    assert [f"two: {note}" in titles[name] for name in ("norms.png", "singular_values.png", "overlap.png")] == [
        False,
        True,
        True,
    ]


def drawn(monkeypatch, found, labels):
    """({picture: its titles in one line}, {picture: lines in its first panel}), without drawing them"""
    titles, lines = {}, {}

    def keep(figure, path):
        texts = [figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)]
        titles[path.name], lines[path.name] = " ".join(" ".join(texts).split()), len(figure.axes[0].lines)
        return path

    monkeypatch.setattr(pictures, "save_figure", keep)
    save_pictures(found, "drawn", labels)
    return titles, lines


def test_pictures_of_two_adapters_of_one_name_have_both(monkeypatch):
    found = compare(*(inspect_adapter(write(Path("x"), {"h.0.q": factors(rank)})) for rank in (3, 2)))
    titles, lines = drawn(monkeypatch, found, ["x", "x"])
    assert lines["norms.png"] == lines["singular_values.png"] == 2 and "(dashed: x, solid: x)" in titles["norms.png"]


def test_names_have_room_in_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for folder, rank in (("x", 24), ("y", 16)):
        write(Path(folder), stack(2, [rank], ("self_attn.q_proj", "mlp.gate_proj"), K=64, N=64))
    lines = invoke("inspect", "x", "y").output.splitlines()
    rows = [line for line in lines if " 24 → 16 " in line]
    assert [line.split()[0] for line in rows] == [
        f"{i}.{kind}" for i in (0, 1) for kind in ("mlp.gate_proj", "self_attn.q_proj")
    ]
    assert all(line.rstrip().endswith("%") for line in rows)


def test_kohyas_file_with_scalings_of_its_own_and_a_module_that_is_no_plain_lora():
    A, B = factors(4)
    tensors = {
        "lora_unet_q.lora_down.weight": A,
        "lora_unet_q.lora_up.weight": B,
        "lora_unet_q.alpha": torch.tensor(2.0),
    }
    dora = {
        "lora_unet_k.lora_down.weight": A + 0,
        "lora_unet_k.lora_up.weight": B + 0,
        "lora_unet_k.dora_scale": B[0] + 0,
    }
    save_file(tensors | dora, "mixed.safetensors")
    found = inspect_adapter("mixed.safetensors")
    assert found.kind == "kohya" and found.ranks() == {"lora_unet_q": 4} and found.scalings() == {"lora_unet_q": 0.5}
    assert spectra(found)["lora_unet_q"].norm == pytest.approx(dense(0.5, A, B).norm().item())
    output = invoke("inspect", "mixed.safetensors", "--html", "mixed.html").output
    assert "left out: lora_unet_k" in output and "DoRA scales by a trained magnitude" in output
    save_file(dora, "dora.safetensors")
    assert "must hold lora_A and lora_B of at least one module, got lora_unet_k" in refused("dora.safetensors")
    assert "nowhere.safetensors is missing" in refused("nowhere.safetensors")


def test_before_and_after_in_pictures():
    before = stack(2, [4, 3])
    after = {name: (A[: 1 + i % 2], B[:, : 1 + i % 2]) for i, (name, (A, B)) in enumerate(before.items())}
    write(Path("before"), before)
    ranks = {name: len(A) for name, (A, _) in after.items()}
    write(Path("run/after"), after, alpha_pattern={name: 2 * rank for name, rank in ranks.items()})
    report = {"spec": {"r": 4}, "ranks": ranks, "t_c": 3, "losses": {"ours": [1.0] * 5}}
    Path("run/report.json").write_text(json.dumps(report))
    result = invoke("inspect", "run/after", "--before", "before", "--plot", "new/pictures")
    assert "before: 14 vectors" in result.output and "now: 6 vectors" in result.output and "█" in result.output
    names = ["norms.png", "overlap.png", "ranks.png", "singular_values.png", "steps.png"]
    assert sorted(file.name for file in Path("new/pictures").iterdir()) == names
    for name in names:
        with Image.open(f"new/pictures/{name}") as image:
            image.verify()
            assert min(image.size) > 200


def test_pictures_of_an_adapter_that_never_trained(recwarn):
    """B = 0: nothing has a logarithm. The names have neither kinds nor layers, and there are more than panels."""
    modules = {f"part{chr(97 + i)}": (factors(2)[0], torch.zeros(9, 2)) for i in range(20)}
    save_pictures(inspect_adapter(write(Path("x"), modules)), "pictures")
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_the_clip_of_a_run_is_read_from_its_report():
    modules = {"h.0.q": factors(2), "h.1.q": factors(4)}
    write(Path("run/adapter"), modules)
    report = {"spec": {"r": 4}, "ranks": {"h.0.q": 2, "h.1.q": 4, "h.2.q": 0}, "t_c": 3, "losses": {"ours": [1.0] * 5}}
    Path("run/report.json").write_text(json.dumps(report))
    history = inspect_adapter("run/adapter").history
    assert history == RankHistory({n: [n] for n in report["ranks"]}, [4] * 3, [[3, 0, 2], [3, 2, 0]], 5)
    result = invoke("inspect", "run/adapter", "--over-steps", "steps.png")
    assert "report.json: ranks over 5 steps in 3 groups" in result.output and Path("steps.png").exists()
    for change in ({"ranks": {"h.0.q": 1, "h.1.q": 4}}, {"t_c": None}, {"losses": {"ours": [1.0]}}, {"spec": 3}):
        Path("run/report.json").write_text(json.dumps(report | change))
        assert inspect_adapter("run/adapter").history is None
    Path("run/report.json").write_text("another file of that name")
    assert "over_steps needs a rank_history.json" in refused("run/adapter", "--over-steps", "steps.png")


def test_ranks_at_some_steps_are_columns_of_the_table():
    history = RankHistory({"a": ["a"], "b": ["b"]}, [1, 5], [[1, 0, 2], [2, 0, 3], [2, 1, 4], [6, 0, 1]], 7)
    steps = [0, 1, 2, 5, 6, 7]
    assert history.at(steps) == history.table()[:, steps].tolist()


def test_what_cannot_be_shown_is_refused_before_anything_is_written():
    write(Path("x"), {"a": factors(2)})
    Path("file").touch()
    assert "before must go with one adapter, got two and 'x'" in refused("x", "x", "--before", "x")
    assert "html must be in a folder that is there, got 'nowhere/page.html'" in refused(
        "x", "--html", "nowhere/page.html"
    )
    assert "html must end in .html, got 'page.pdf'" in refused("x", "--html", "page.pdf", "-o", "ranks.png")
    assert "plot must be a folder, got the file 'file'" in refused("x", "--plot", "file")
    write(Path("odd"), {"a": factors(2)}, lora_alpha=None)
    assert "a" in invoke("inspect", "odd").output
    assert "lora_alpha must be a number > 0, got None" in refused("odd", "--plot", "pictures", "-o", "ranks.png")
    write(Path("slow"), {"a" * 30: factors(2)}, rank_pattern={"(a+)+b": 2})
    assert "rank_pattern must be a regular expression that cannot take forever" in refused(
        "slow", "--html", "page.html"
    )
    assert sorted(path.name for path in Path().iterdir()) == ["file", "odd", "slow", "x"]

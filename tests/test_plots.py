"""Pictures: the grid behind the heat map, and files that are whole or not there."""

import pytest
from matplotlib.axes import Axes
from PIL import Image

from adaptlora.plots import _smoothed, describe_ranks, group_ticks, loss_curve, rank_grid, rank_heatmap, rank_steps


def test_grid_has_a_row_for_each_kind_and_a_column_for_each_layer():
    ranks = {"h.10.mlp.up": 5, "h.2.attn.q": 1, "h.2.mlp.up": 2, "h.10.attn.q": 3}
    assert rank_grid(ranks) == (["mlp.up", "attn.q"], ["2", "10"], [[2, 5], [1, 3]])


def test_grid_of_missing_modules_names_without_numbers_and_two_stacks():
    assert rank_grid({"h.0.q": 1, "h.1.k": 2}) == (["q", "k"], ["0", "1"], [[1, None], [None, 2]])
    assert rank_grid({"pooler.dense": 3, "h.0.q": 4}) == (["pooler.dense", "q"], ["0", "–"], [[None, 3], [4, None]])
    kinds, layers, table = rank_grid({"encoder.0.q": 1, "decoder.0.q": 2})
    assert kinds == ["q", "decoder: q"] and layers == ["0"] and table == [[1], [2]]


def test_describe_ranks():
    assert describe_ranks({"a": 3, "b": 0}) == "3 vectors in 2 modules, 1.50 on average"


def test_smoothing_has_no_lag_and_keeps_constants():
    assert _smoothed([2.0] * 20) == [2.0] * 20
    line = [float(i) for i in range(20)]
    assert _smoothed(line)[5:15] == pytest.approx(line[5:15])
    assert _smoothed([1.0, 3.0], reach=1) == [2.0, 2.0]


def test_heatmap_and_curve_are_pngs_and_leave_nothing_else(tmp_path):
    ranks = {f"model.layers.{i}.self_attn.{kind}": i for i in range(3) for kind in ("q_proj", "k_proj")}
    heatmap = rank_heatmap(ranks, tmp_path / "new" / "ranks.png", max_rank=8, title="ranks")
    curve = loss_curve({"ours": [2.0, 1.0, 0.5], "theirs": [2.0, 1.5]}, tmp_path / "new" / "loss.png", t_p=1, t_c=2)
    for path in (heatmap, curve):
        with Image.open(path) as image:
            image.verify()
            assert image.format == "PNG" and min(image.size) > 200
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["loss.png", "ranks.png"]


def test_wide_models_and_rank_zero_everywhere(tmp_path):
    rank_heatmap({f"h.{i}.q": 0 for i in range(40)}, tmp_path / "zero.png")
    loss_curve({"ours": [0.0]}, tmp_path / "one.png")


def history(groups, steps=20):
    modules = {group: [f"{group}.q"] for group in groups}
    changes = [[step, step % len(groups), 1 + step % 3] for step in range(1, steps + 1)]
    return {"groups": modules, "start": [1] * len(groups), "changes": changes, "steps": steps}


@pytest.mark.parametrize("count", [1, 6, 30, 210])
def test_ranks_over_the_steps_for_few_and_many_groups(tmp_path, count):
    path = rank_steps(history([f"h.{i}" for i in range(count)]), tmp_path / "new" / "steps.png")
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG" and max(image.size) < 1300
    assert [path.name for path in path.parent.iterdir()] == ["steps.png"]


def test_rank_steps_draws_the_table_and_its_sum(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("matplotlib.axes.Axes.step", lambda self, *data, **style: drawn.update(sum=data[1]))
    show = Axes.imshow
    monkeypatch.setattr(
        "matplotlib.axes.Axes.imshow",
        lambda self, table, **style: drawn.update(table=table) or show(self, table, **style),
    )
    rank_steps(history(["h.0", "h.1"], steps=3), tmp_path / "steps.png")
    assert drawn["table"].tolist() == [[1, 1, 3, 3], [1, 2, 2, 1]] and drawn["sum"] == [2, 3, 5, 4]


def test_a_run_without_a_step_or_a_change(tmp_path):
    rank_steps({"groups": {"h.0": ["q"]}, "start": [0], "changes": [], "steps": 0}, tmp_path / "steps.png")


def testgroup_ticks_stand_in_the_middle_of_a_layer_and_do_not_crowd():
    assert group_ticks(["h.0.q", "h.0.k", "h.0.v", "h.1.q", "pooler"]) == ([1, 3, 4], ["0", "1", "pooler"])
    rows, names = group_ticks([f"h.{i}" for i in range(100)])
    assert rows == list(range(0, 100, 4)) and names[:2] == ["0", "4"]


def test_nothing_to_draw_is_refused_before_a_file_is_there(tmp_path):
    with pytest.raises(ValueError, match="rank_heatmap: ranks must name at least one module"):
        rank_heatmap({}, tmp_path / "a.png")
    for losses in ({}, {"ours": []}):
        with pytest.raises(ValueError, match="loss_curve: losses must hold"):
            loss_curve(losses, tmp_path / "a.png")
    with pytest.raises(ValueError, match="rank history: groups must be"):
        rank_steps(history(["h.0"]) | {"groups": {}}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_drawing_keeps_the_old_file(tmp_path, monkeypatch):
    path = rank_heatmap({"h.0.q": 1}, tmp_path / "ranks.png")
    before = path.read_bytes()

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        rank_heatmap({"h.0.q": 2}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["ranks.png"]

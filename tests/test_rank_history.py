"""Ranks over the steps of a run: their table by hand and from a run, and histories that cannot be."""

import models
import pytest
import torch

import adaptlora
from adaptlora.rank_history import RankHistory

GROUPS = {"h.0": ["h.0.q", "h.0.k"], "h.1": ["h.1.q"]}
HAND = {"groups": GROUPS, "start": [1, 1], "changes": [[1, 0, 3], [2, 1, 4], [2, 0, 2], [4, 1, 1]], "steps": 4}


def test_table_average_and_final_ranks_by_hand():
    history = RankHistory(**HAND)
    assert history.table().tolist() == [[1, 3, 2, 2, 2], [1, 1, 4, 4, 1]]
    # two modules and one, over the ranks that the four steps were computed with
    assert history.average_rank() == pytest.approx((2 * (1 + 3 + 2 + 2) + (1 + 1 + 4 + 4)) / 12)
    assert history.final_ranks() == {"h.0.q": 2, "h.0.k": 2, "h.1.q": 1}


def test_a_table_that_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="few enough for a table of 16777216 ranks, got 8388608"):
        RankHistory(**HAND | {"steps": 1 << 23}).table()


def test_several_changes_of_a_group_in_one_step_and_none_at_all():
    twice = RankHistory(**HAND | {"changes": [[2, 0, 5], [2, 0, 4]]})
    assert twice.table()[0].tolist() == [1, 1, 4, 4, 4]
    still = RankHistory(**HAND | {"changes": [], "steps": 0})
    assert still.table().tolist() == [[1], [1]] and still.average_rank() == 1


def test_table_holds_the_ranks_that_a_run_had():
    model = models.Net()
    config = adaptlora.LaLoRAConfig(r=6, gamma=6, temperature=5, target_modules=["first", "second"], group_by="module")
    adapter = adaptlora.attach(model, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    adapter.track(optimizer)
    seen = [list(adapter.ranks().values())]
    for _ in range(12):
        models.task_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        seen.append(list(adapter.ranks().values()))
    history = RankHistory(**adapter.method.history())
    assert len({tuple(ranks) for ranks in seen}) > 2
    assert history.table().t().tolist() == seen and history.final_ranks() == adapter.ranks()
    assert history.average_rank() == pytest.approx(sum(map(sum, seen[:-1])) / 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {}}, "groups must be lists of module names by group, none empty, got {}"),
        ({"groups": ["h.0"]}, "groups must be"),
        ({"groups": GROUPS | {"h.1": []}}, "groups must be"),
        ({"groups": GROUPS | {"h.1": [1]}}, "groups must be"),
        ({"start": [1]}, r"start must be a rank for each of 2 groups, got \[1\]"),
        ({"start": [1, -1]}, "start must be"),
        ({"start": [1, True]}, "start must be"),
        ({"start": None}, "start must be"),
        ({"steps": -1}, "steps must be an integer ≥ 0, got -1"),
        ({"steps": 4.0}, "steps must be"),
        ({"changes": None}, "changes must be a list, got None"),
        ({"changes": [[0, 0, 2]]}, r"changes must be \[step, group's number, rank\], ascending.* got \[0, 0, 2\]"),
        ({"changes": [[5, 0, 2]]}, r"with steps of 4 and 2 groups, got \[5, 0, 2\]"),
        ({"changes": [[1, 2, 2]]}, r"got \[1, 2, 2\]"),
        ({"changes": [[1, 0, -2]]}, r"got \[1, 0, -2\]"),
        ({"changes": [[1, 0]]}, r"got \[1, 0\]"),
        ({"changes": [[2, 0, 2], [1, 0, 3]]}, r"got \[1, 0, 3\]"),
        ({"changes": [7]}, "got 7"),
    ],
)
def test_what_no_run_can_have_is_refused(change, message):
    with pytest.raises(ValueError, match=f"rank history: .*{message}"):
        RankHistory(**HAND | change)

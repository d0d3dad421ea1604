"""Kill -9 while training, and at every call that a save makes to the disk: nothing is lost, and the run goes on bit for bit."""

import json
import random
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import crash_trials
from kill_calls import kill_every_call
from test_checkpoint import Loop

import adaptlora

pytestmark = pytest.mark.skipif(not hasattr(crash_trials.os, "fork"), reason="needs fork, and this system has none")


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "method"), [("raw", "normal"), ("raw", "lalora"), ("trainer", "lalora")])
def test_killed_runs_end_like_the_one_that_nobody_killed(loop, method, tmp_path):
    reference = crash_trials.Reference(loop, method, tmp_path / "reference")
    assert len(reference.losses) == crash_trials.STEPS
    draw = random.Random(0)
    # A moment may be drawn that comes after the end: how fast the machine is decides nothing.
    kills, number = 0, 0
    while kills < 2:
        result = crash_trials.trial(reference, tmp_path / f"trial{number}", draw)
        assert not result["faults"]
        kills += len(result["phases"])
        number += 1


def test_the_comparison_sees_another_loss_and_another_state(tmp_path):
    reference = crash_trials.Reference("raw", "normal", tmp_path / "reference")
    journal = crash_trials.Journal(tmp_path / "other.losses")
    journal.file.write_bytes((tmp_path / "reference.losses").read_bytes())
    digest = tmp_path / "other.digest"
    digest.write_text(json.dumps(reference.digest))
    assert not reference.faults(tmp_path / "other", journal)
    journal.loss(3, 0.25)
    digest.write_text(json.dumps({**reference.digest, "torch": ""}))
    faults = reference.faults(tmp_path / "other", journal)
    assert faults == ["losses differ at steps [3]", "the final state of torch differs"]


def every_call(folder, loop, expected):
    """The last checkpoint's step after a save by `loop` was ended at its first call, its second, …: always one of `expected`."""
    found = []

    def check(completed):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = adaptlora.last_checkpoint(folder)
        found.append(int(path.name.removeprefix("checkpoint-")))
        adaptlora.check_checkpoint(path)
        fresh = Loop()
        assert fresh.load(path).step == found[-1] and found[-1] in expected
        if completed:
            assert found[-1] == expected[-1]

    calls = kill_every_call(lambda: loop.save(folder), check)
    assert calls > 8
    return found


def test_a_save_that_is_killed_at_any_call_leaves_the_one_before(tmp_path):
    loop = Loop()
    loop.step()
    loop.save(tmp_path)
    loop.step()
    found = every_call(tmp_path, loop, (1, 2))
    assert found == sorted(found) and found[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_replacing_the_only_checkpoint_never_loses_it(tmp_path):
    loop = Loop()
    loop.step()
    loop.save(tmp_path)
    every_call(tmp_path, loop, (1,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_removing_old_ones_is_killed_as_well(tmp_path):
    loop = Loop()
    for _ in range(2):
        loop.step()
        loop.save(tmp_path)
    loop.step()
    assert every_call(tmp_path, loop, (2, 3))[-1] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]

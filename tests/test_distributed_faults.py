"""A process that is killed, stopped or has other ranks: the others end naming it; a change that is refused leaves all as it was."""

import os
import signal
from datetime import timedelta

import pytest
import torch
from processes import outcomes, run
from torch import nn

import adaptlora
from adaptlora.distributed import decisions
from adaptlora.ranks import RankedPair

TIMEOUT = 4.0


def make(method: str = "normal"):
    """An adapter on a small float64 model, its optimizer, and batches of this process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    config = {
        "normal": adaptlora.NormALConfig(r=4, lora_alpha=8, target_modules="all-linear", target_r=2, t_p=1, t_c=3),
        "lalora": adaptlora.LaLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", gamma=4.0),
    }[method]
    adapter = adaptlora.attach(model, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    return adapter, optimizer


def step(adapter, optimizer, rank: int, look=lambda: None):
    generator = torch.Generator().manual_seed(100 * adapter.method.t + rank)
    x = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    loss = adapter.model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    look()
    adapter.step(loss)


def content(adapter, optimizer) -> dict:
    """Ranks, factors, optimizer state and the method's, to be compared for equality."""
    held = [[value.tolist() for value in optimizer.state[factor].values()] for factor in adapter.factors()]
    return adapter.ranks(), [factor.tolist() for factor in adapter.factors()], held, adapter.method.state_dict()


def distributed(rank: int, method: str = "normal", seconds: float = TIMEOUT):
    adapter, optimizer = make(method)
    adapter.distribute(timeout=timedelta(seconds=seconds))
    return adapter, optimizer


def end(adapter, optimizer, rank: int, steps: int = 8):
    """Steps until a ProcessError: its text, the processes that it names, and how many steps there were."""
    try:
        for _ in range(steps):
            step(adapter, optimizer, rank)
    except adaptlora.ProcessError as error:
        return f"{error}", error.processes, adapter.method.t
    return "no error", [], adapter.method.t


def killed_in_step(when: int):
    rank = int(os.environ["RANK"])
    adapter, optimizer = distributed(rank)
    if rank == 2:

        def die(_):
            if adapter.method.t == when:
                os.kill(os.getpid(), signal.SIGKILL)

        adapter.factors()[0].register_post_accumulate_grad_hook(die)
    return end(adapter, optimizer, rank)


def test_a_killed_process_is_named_by_all_others_also_by_those_that_do_not_talk_to_it():
    found = outcomes(4, killed_in_step, 1)
    assert found[2] is None
    for returned, result in (found[0], found[1], found[3]):
        assert returned, result
        text, processes, steps = result
        assert processes == [2] and steps == 1
        assert text.startswith("averaging gradients: in step 1, after ")
        assert "process 2 (pid " in text and text.endswith("has ended") and "process 1" not in text


def killed_in_change(moment: str):
    rank = int(os.environ["RANK"])
    adapter, optimizer = distributed(rank)
    reached = decisions.Agreement.reached

    def die(agreement, ranks):
        if moment == "after":
            reached(agreement, ranks)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        decisions.Agreement.reached = die
    return *end(adapter, optimizer, rank), adapter.ranks(), len(optimizer.state[adapter.factors()[0]]["exp_avg"])


@pytest.mark.parametrize(("moment", "doing"), [("before", "step: agreeing on ranks"), ("after", "averaging gradients")])
def test_a_process_killed_in_a_rank_change_leaves_the_others_with_the_old_ranks_or_the_new_ones(moment, doing):
    killed, *found = outcomes(3, killed_in_change, moment)
    assert killed is None
    for returned, result in found:
        assert returned, result
        text, processes, steps, ranks, rows = result
        assert text.startswith(f"{doing}: in step ") and text.endswith("has ended") and processes == [0]
        changed = moment == "after"
        assert steps == (3 if changed else 2)
        assert (sum(ranks.values()) == 4) == changed and ranks == found[0][1][3]
        assert rows == next(iter(ranks.values()))


def stopped():
    rank = int(os.environ["RANK"])
    adapter, optimizer = distributed(rank)
    pids = adapter.processes.gather(os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    found = end(adapter, optimizer, rank)
    if rank != 1:
        os.kill(pids[1], signal.SIGCONT)
    return found


def test_a_stopped_process_is_named_once_the_timeout_is_over_and_learns_it_itself():
    found = outcomes(3, stopped)
    for rank, (returned, result) in enumerate(found):
        assert returned, result
        text, processes, _ = result
        assert processes == [1], text
        assert ("process 1 (pid " in text) and ("this one" in text) == (rank == 1)
        assert text.endswith("does not answer")


def changes_alone():
    rank = int(os.environ["RANK"])
    adapter, optimizer = distributed(rank)
    step(adapter, optimizer, rank)
    if rank == 1:
        adapter._commit({"0": 4, "2": 1}, compact=True)
    return end(adapter, optimizer, rank)


def test_one_process_whose_ranks_alone_have_changed_is_named_on_all_with_the_modules():
    for returned, result in outcomes(3, changes_alone):
        assert returned, result
        text, processes, steps = result
        assert processes == [1] and steps == 1
        assert "process 1 (pid " in text and "has other ranks than process 0: 2 1 and not 4" in text


def refused_change(fails_in: int | None):
    """A run in which one process has no memory for the change of step 3, and all try again: what each raised, and the end."""
    rank = int(os.environ["RANK"])
    adapter, optimizer = distributed(rank)
    plan, raised = RankedPair.plan, None

    def without_memory(pair, *arguments, **options):
        if pair is adapter.layers["2"].pair:
            raise MemoryError("no memory for it")
        return plan(pair, *arguments, **options)

    for _ in range(2):
        step(adapter, optimizer, rank)
    if rank == fails_in:
        RankedPair.plan = without_memory
    before = []
    try:
        step(adapter, optimizer, rank, look=lambda: before.append(content(adapter, optimizer)))
    except (MemoryError, RuntimeError) as error:
        raised = f"{type(error).__name__}: {error}"
        assert [content(adapter, optimizer)] == before
        RankedPair.plan = plan
        adapter.step()
    for _ in range(3):
        step(adapter, optimizer, rank)
    return raised, adapter.method.t, adapter.ranks(), content(adapter, optimizer)


def test_a_change_that_one_process_cannot_prepare_is_refused_by_all_and_training_goes_on_in_step():
    expected = run(3, refused_change, None)[0]
    found = run(3, refused_change, 1)
    process = "step: process 1: MemoryError('no memory for it')"
    assert [raised for raised, *_ in found] == [
        f"RuntimeError: {process}",
        "MemoryError: no memory for it",
        f"RuntimeError: {process}",
    ]
    assert expected[0] is None and expected[1] == 6 and sum(expected[2].values()) == 4
    for _, *rest in found:
        assert rest == list(expected[1:])

"""Checkpoints of several processes: all have the same outcome, and a run goes on exactly on as many processes or on others."""

import errno
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

import adaptlora
from adaptlora import checkpoint
from adaptlora.checkpoint_files import MANIFEST, read_manifest
from adaptlora.distributed.distribution import Distribution
from adaptlora.distributed.processes import ProcessGroup
from adaptlora.distributed.sharding import encode_parts, gathered
from adaptlora.distributed.state import broadcast_state
from adaptlora.distributed.torch_checkpoint import AdapterState, load_distributed
from adaptlora.encoding import encode
from adaptlora.integrations import trainer_checkpoint
from adaptlora.random_state import random_state
from adaptlora.tensor_files import save_file
from tests.processes import run

BATCH, SAVED, STEPS = 16, 4, 7
CONFIGS = {
    "normal": adaptlora.NormALConfig(
        r=6, target_r=3, t_p=2, t_c=3, target_modules=["first", "second"], modules_to_save=["classifier"]
    ),
    "lalora": adaptlora.LaLoRAConfig(
        r=6, contribution="fisher", ema=0.5, gamma=8.0, group_by="module", target_modules=["first", "second"],
        modules_to_save=["classifier"],
    ),
}  # fmt: skip
WAYS = ("load", "load_dcp")
EXACT = [(method, 0.0) for method in CONFIGS]
RUNS = EXACT + [(method, dropout) for method in CONFIGS for dropout in (0.2,)]


class Net(nn.Module):
    def __init__(self, dropout, width=17):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(13, width, dtype=torch.float64)
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.second = nn.Linear(width, 11, bias=False, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(11, 3, dtype=torch.float64)

    def forward(self, x):
        return self.classifier(self.dropout(torch.relu(self.second(torch.relu(self.norm(self.first(x)))))))


class Loop:
    """A loop of several processes, each with its share of the same global batches and with random numbers of its own."""

    def __init__(self, method="normal", dropout=0.0, *, seed=0, distribute=True, shard=False):
        self.adapter = adaptlora.attach(Net(dropout), CONFIGS[method])
        model = self.adapter.model
        model.norm.requires_grad_(True)
        if shard:
            fully_shard(model, ignored_params=set(self.adapter.factors()))
        self.optimizer = torch.optim.AdamW([*self.adapter.parameters(), *model.norm.parameters()], lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3, 6])
        self.adapter.track(self.optimizer)
        if distribute:
            self.adapter.distribute(model)
        self.losses = []
        rank = self.adapter.processes.rank
        for start in (torch.manual_seed, random.seed, np.random.seed):
            start(seed + rank)

    def step(self):
        generator = torch.Generator().manual_seed(len(self.losses))
        x = torch.randn(BATCH, 13, dtype=torch.float64, generator=generator)
        labels = torch.randint(0, 3, (BATCH,), generator=generator)
        processes = self.adapter.processes
        mine = slice(processes.rank * BATCH // processes.size, (processes.rank + 1) * BATCH // processes.size)
        loss = nn.functional.cross_entropy(self.adapter.model(x[mine]), labels[mine])
        (loss + self.adapter.penalty()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.adapter.step(loss)
        self.scheduler.step()
        self.losses.append(processes.total([loss.item() / processes.size])[0])

    def until(self, step):
        while len(self.losses) < step:
            self.step()
        return self

    def save(self, folder):
        parts = {"scheduler": self.scheduler, "extra": {"losses": list(self.losses)}}
        adaptlora.save_checkpoint(folder / "own", self.adapter, self.optimizer, step=len(self.losses), **parts)
        state = AdapterState(self.adapter, self.optimizer, **parts)
        dcp.save({"adapter": state, "more": torch.arange(3)}, checkpoint_id=folder / "dcp")

    def load(self, folder):
        path = adaptlora.last_checkpoint(folder / "own", processes=self.adapter.processes)
        step, extra = adaptlora.load_checkpoint(path, self.adapter, self.optimizer, scheduler=self.scheduler)
        self.losses = extra["losses"]
        assert step == len(self.losses)
        return self

    def load_dcp(self, folder):
        extra = load_distributed(folder / "dcp", self.adapter, self.optimizer, scheduler=self.scheduler)
        self.losses = extra["losses"]
        return self

    def state(self):
        """(JSON, tensors) of all that processes share."""
        parts = {
            "adapter": self.adapter,
            "model": self.adapter.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }
        tensors = {}
        state = encode_parts("state", "", {name: part.state_dict() for name, part in parts.items()}, tensors)
        return state, gathered(tensors)

    def random(self):
        tensors = {}
        return json.dumps(encode("random", "", random_state(self.adapter.model), tensors)), tensors

    def end(self):
        self.until(STEPS)
        return self.losses, self.state(), self.random()


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert found[1][name].dtype == tensor.dtype and torch.equal(found[1][name], tensor), name


def assert_close(found, expected):
    losses, (facts, tensors), _ = found
    assert losses == pytest.approx(expected[0], rel=1e-10, abs=0)
    assert tensors.keys() == expected[1][1].keys() and facts["adapter"].keys() == expected[1][0]["adapter"].keys()
    for name, tensor in expected[1][1].items():
        assert tensors[name].shape == tensor.shape, name
        assert torch.allclose(tensors[name].double(), tensor.double(), rtol=1e-10, atol=1e-12), name


def record(folder):
    """Runs of four: what there was when they were saved, and at the end, with and without another loop that goes on."""
    found = {}
    for method, dropout in RUNS:
        loop = Loop(method, dropout).until(SAVED)
        loop.save(folder / f"{method}-{dropout}")
        found[method, dropout] = {"saved": loop.state(), "random": loop.random(), "end": loop.end()}
    return found, resume(folder, RUNS)


def resume(folder, runs, again=None, **options):
    """What is loaded from `folder`, by either way, and where it ends; saved once more to `again`, a step later."""
    found = {}
    for method, dropout in runs:
        for way in WAYS:
            loop = Loop(method, dropout, seed=50, **options)
            getattr(loop, way)(folder / f"{method}-{dropout}")
            result = found[way, method, dropout] = {"saved": loop.state(), "random": loop.random()}
            if again is not None and way == "load":
                loop.until(SAVED + 1).save(again / f"{method}-{dropout}")
            result["end"] = loop.end()
    return found


def work_of_two(folder):
    found = {
        "resumed": resume(folder / "four", EXACT, folder / "two"),
        "failures": failures(folder / "failures", folder / "four" / "lalora-0.0"),
        "brought": bring(),
        "sealed": seal(folder / "trainer"),
        "sharded": resume(folder / "four", [("normal", 0.0)], shard=True),
    }
    loop = Loop(shard=True).until(SAVED)
    with torch.no_grad():
        loop.adapter.model(torch.zeros(1, 13, dtype=torch.float64))  # FSDP leaves the root's parameters whole
    loop.save(folder / "sharded" / "normal-0.0")
    state = AdapterState(loop.adapter, loop.optimizer, scheduler=loop.scheduler, extra={"losses": loop.losses})
    saved = loop.state()
    saving = dcp.async_save(
        {"adapter": state}, checkpoint_id=folder / "async" / "dcp", process_group=dist.new_group(backend="gloo")
    )
    loop.step()
    saving.result()
    assert_same(Loop(shard=True).load_dcp(folder / "async").state(), saved)
    return found | {"sharded again": resume(folder / "sharded", [("normal", 0.0)], shard=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def of_four(folder):
    return run(4, record, folder / "four")


@pytest.fixture(scope="module")
def of_two(folder, of_four):
    return run(2, work_of_two, folder)


def test_on_as_many_processes_it_goes_on_bit_for_bit(of_four):
    for before, mine in of_four:
        for (_, *key), result in mine.items():
            expected = before[tuple(key)]
            assert result["end"][0] == expected["end"][0]
            for part in ("saved", "random"):
                assert_same(result[part], expected[part])
            assert_same(result["end"][1], expected["end"][1])
            assert_same(result["end"][2], expected["end"][2])
    # Ranks had been changed, vectors were parked with their state, and each process had its own dropout.
    recorded = of_four[0][0]
    names = recorded["lalora", 0.0]["saved"][1].keys()
    assert any(".parked." in name and "exp_avg" in name for name in names)
    assert recorded["normal", 0.0]["saved"][1][".adapter.factors.first.lora_A"].shape[0] < 6
    assert len({str(before["normal", 0.2]["random"]) for before, _ in of_four}) == 4


def assert_goes_on(found, of_four):
    for mine, (before, _) in zip(found, of_four, strict=False):
        for (_, *key), result in mine.items():
            assert_same(result["saved"], before[tuple(key)]["saved"])
            assert_same(result["random"], before[tuple(key)]["random"])
            assert_close(result["end"], before[tuple(key)]["end"])


def test_on_fewer_it_goes_on_as_four_would_have(folder, of_four, of_two):
    assert_goes_on([result["resumed"] for result in of_two], of_four)
    assert_goes_on([resume(folder / "four", EXACT, distribute=False)], of_four)


def test_sharded_parameters_and_their_state_are_stored_whole_and_loaded_sharded_or_not(folder, of_four, of_two):
    assert_goes_on([result["sharded"] for result in of_two], of_four)
    alone = resume(folder / "sharded", [("normal", 0.0)], distribute=False)
    for mine in [result["sharded again"] for result in of_two]:
        for key, result in mine.items():
            assert_same(result["saved"], alone[key]["saved"])
            assert_close(result["end"], of_four[0][0][key[1:]]["end"])


def test_on_more_the_new_ones_begin_with_random_states_of_their_own(folder, of_four, of_two):
    found = run(4, resume, folder / "two", EXACT)
    drawn = set()
    for mine in found:
        for key, result in mine.items():
            assert_same(result["saved"], found[0][key]["saved"])
            assert_close(result["end"], of_four[0][0][key[1:]]["end"])
            drawn.add(str([result["random"][0], *(t.tolist() for t in result["random"][1].values())]))
    assert len(drawn) == 4  # the same however they were loaded


def test_dcp_holds_tensors_alone_each_written_once(folder, of_four):
    path = folder / "four" / "lalora-0.0" / "dcp"
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert all(len(facts.chunks) == 1 for facts in stored.values())
    assert [file.name for file in path.glob("*.distcp") if file.stat().st_size > 2000] == ["__0_0.distcp"]


# One process's state for all


def bring():
    """Two processes that trained apart: what becomes of them when all take the state of process 1."""
    rank = dist.get_rank()
    groups = [dist.new_group([process]) for process in range(2)]
    loop = Loop("lalora", distribute=False)
    loop.adapter.distribute(process_group=groups[rank])
    ups = [layer.lora_B for layer in loop.adapter.layers.values()]
    rest = [p for p in loop.adapter.parameters() if not any(p is up for up in ups)]
    optimizers = [torch.optim.AdamW(rest, lr=1e-2), torch.optim.SGD(ups, lr=0.1 + rank, momentum=0.9)]
    for optimizer in optimizers:
        loop.adapter.track(optimizer)
    loop.optimizer = Both(optimizers)
    loop.scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizers[0], [3, 6])
    loop.until(2 + 3 * rank)
    loop.adapter._distribution = Distribution(ProcessGroup())

    def state():
        facts, tensors = loop.state()
        return {name: facts[name] for name in ("adapter", "model", "optimizer")}, tensors

    drawn, apart = loop.random(), state()
    broadcast_state(loop.adapter, optimizers[:: 1 - 2 * rank], 1)
    assert_same(loop.random(), drawn)
    brought = state()
    loop.adapter.config = CONFIGS["normal" if rank else "lalora"]
    refused = message(broadcast_state, loop.adapter, optimizers, 0)
    assert_same(state(), brought)
    return {"apart": apart, "brought": brought, "refused": refused}


class Both:
    def __init__(self, optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def zero_grad(self):
        """Done."""

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]


def test_the_state_of_one_process_becomes_that_of_all(of_two):
    first, second = (result["brought"] for result in of_two)
    shapes = [{tuple(t.shape) for t in side["apart"][1].values()} for side in (first, second)]
    assert shapes[0] != shapes[1]
    for side in (first, second):
        assert_same(side["brought"], second["apart"])
        assert "must be attached with a LaLoRAConfig" in side["refused"]


# Trainer's


def trainers_checkpoint(path, ranks, processes=None):
    """What Trainer writes, as far as its names and kinds of files go; random states of the processes `ranks`."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.ones(2)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", *(f"rng_state_{rank}.pth" for rank in ranks)):
        torch.save({}, path / name)
    callbacks = {} if processes is None else {"AdapterCallback": {"args": {}, "attributes": {"processes": processes}}}
    state = {"global_step": 3, "stateful_callbacks": callbacks}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def seal(folder):
    """Process 1 is late with its file, then process 0 cannot write the seal, then both resume from different steps."""
    processes = ProcessGroup()
    path = folder / "checkpoint-3"
    if processes.first:
        trainers_checkpoint(path, [0], 2)
    dist.barrier()
    if not processes.first:
        time.sleep(0.3)
        torch.save({}, path / "rng_state_1.pth")
    trainer_checkpoint.seal(path, first=processes.first, processes=processes)
    sealed = sorted(read_manifest(path)["files"])
    if processes.first:
        (path / "trainer_state.json").unlink()
    told = [message(trainer_checkpoint.seal, path, first=processes.first, processes=processes)]
    state = SimpleNamespace(global_step=3 - processes.rank, stateful_callbacks={})
    told.append(message(trainer_checkpoint.check_resumed, folder, state, processes=processes))
    state = SimpleNamespace(global_step=3, stateful_callbacks={})
    optimizer = torch.optim.SGD([torch.ones(1)]) if processes.rank else None
    began = SimpleNamespace(last_epoch=0)
    told.append(message(trainer_checkpoint.check_resumed, folder, state, optimizer, began, processes=processes))
    return sealed, told


def test_trainers_checkpoint_is_sealed_when_all_have_written_and_errors_reach_all(of_two):
    for process in of_two:
        sealed, told = process["sealed"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(sealed)
        assert "trainer_state.json is missing" in told[0]
        assert (
            "the step to resume from must be the same in all processes, got 3 in process 0, 2 in process 1" in told[1]
        )
        assert "the checkpoint of step 3 must hold optimizer.pt" in told[2]
    assert "Trainer: process 0: " in of_two[1]["sealed"][1][0] and "Trainer: process 1: " in of_two[0]["sealed"][1][2]


@pytest.mark.parametrize(
    ("ranks", "processes", "lost"),
    [
        ([0, 1], 2, None),
        ([0, 1], None, None),
        ([0, 2], None, 1),
        ([1], 2, None),
        ([2, 4], 6, 3),
        ([0], 2, 1),
        ([], 2, 0),
        ([0, 1], 3, 2),
    ],
)
def test_the_random_state_of_every_process_must_be_there(ranks, processes, lost, tmp_path):
    path = trainers_checkpoint(tmp_path / "checkpoint-3", ranks, processes)
    if lost is None:
        adaptlora.check_checkpoint(path)
        return
    with pytest.raises(ValueError, match=f"rng_state_{lost}.pth is missing"):
        adaptlora.check_checkpoint(path)
    if ranks:
        # Sealed, it is what one node has on a disk of its own.
        trainer_checkpoint.seal(path)
        assert (path / MANIFEST).exists()
        adaptlora.check_checkpoint(path)


def test_what_fsdp_writes_is_checked_by_its_names(tmp_path):
    path = trainers_checkpoint(tmp_path / "checkpoint-3", [0, 1], 2)
    for name, old in (("optimizer_0", "optimizer.pt"), ("pytorch_model_fsdp_0", "model.safetensors")):
        (path / old).unlink()
        (path / name).mkdir()
        with pytest.raises(ValueError, match=rf"{name}/.metadata is missing"):
            adaptlora.check_checkpoint(path)
        (path / name / ".metadata").write_text("x")
        adaptlora.check_checkpoint(path)
    trainer_checkpoint.seal(path)
    (path / "optimizer_0" / ".metadata").write_text("y")
    with pytest.raises(ValueError, match=r"optimizer_0/.metadata must have the SHA-256"):
        adaptlora.check_checkpoint(path)


def write_nothing(tensors, file):
    raise OSError(errno.ENOSPC, "no space left", str(file))


class Stuck(torch.optim.lr_scheduler.MultiStepLR):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        if state["last_epoch"] == SAVED and self.fails:
            raise RuntimeError("stuck")


def message(function, *arguments, **keywords):
    with pytest.raises(Exception) as raised:
        function(*arguments, **keywords)
    return f"{type(raised.value).__name__}: {raised.value}"


def failures(folder, saved):
    """What each of two processes is told where one of them fails, and whether that changed anything."""
    told = {}
    loop = Loop("lalora").until(2)
    rank, before = loop.adapter.processes.rank, (loop.state(), loop.random())
    own = saved / "own" / f"checkpoint-{SAVED}"
    parts = loop.adapter, loop.optimizer

    def unchanged():
        assert_same(loop.state(), before[0])
        assert_same(loop.random(), before[1])

    folder.mkdir(exist_ok=True)
    dist.barrier()
    checkpoint.save_file = write_nothing
    told["full"] = message(adaptlora.save_checkpoint, folder, *parts, step=2)
    checkpoint.save_file = save_file
    told["step"] = message(adaptlora.save_checkpoint, folder, *parts, step=rank)
    loop.optimizer.state[loop.adapter.factors()[0]]["odd"] = {1} if rank else 1
    told["odd"] = message(adaptlora.save_checkpoint, folder, *parts, step=2)
    told["odd dcp"] = message(dcp.save, {"adapter": AdapterState(*parts)}, checkpoint_id=folder / "dcp")
    loop.optimizer.state[loop.adapter.factors()[0]].pop("odd")
    told["left"] = sorted(file.name for file in folder.iterdir())
    told["path"] = message(adaptlora.load_checkpoint, own.with_name(f"checkpoint-{rank}"), *parts)
    told["gone"] = message(adaptlora.load_checkpoint, folder / "checkpoint-9", *parts)
    told["gone dcp"] = message(load_distributed, folder / "none", *parts)
    told["key"] = message(load_distributed, saved / "dcp", *parts, key="more")
    scheduler = loop.scheduler if rank == 0 else None
    told["check"] = message(adaptlora.load_checkpoint, own, *parts, scheduler=scheduler)
    stuck = Stuck(loop.optimizer, [3, 6])
    stuck.fails = rank == 1
    unchanged()
    loop.scheduler = stuck
    before = loop.state(), loop.random()
    other = torch.optim.lr_scheduler.MultiStepLR
    Stuck.__module__, Stuck.__qualname__ = other.__module__, other.__qualname__
    told["restore"] = message(adaptlora.load_checkpoint, own, *parts, scheduler=stuck)
    told["restore dcp"] = message(load_distributed, saved / "dcp", *parts, scheduler=stuck)
    unchanged()
    return told


def test_an_error_of_one_process_is_that_of_all_and_nothing_changes(of_two):
    first, second = (result["failures"] for result in of_two)
    assert first["full"].startswith("OSError") and "no space left" in first["full"]
    assert second["full"].startswith("RuntimeError: save_checkpoint: process 0: OSError") and "space" in second["full"]
    for told in (first, second):
        assert (
            "save_checkpoint: step must be the same in all processes, got 0 in process 0, 1 in process 1"
            in told["step"]
        )
        assert "path must be the same in all processes, got checkpoint-0 in process 0" in told["path"]
        assert "'more'" in told["key"] and "must hold an AdapterState" in told["key"]
        assert "stuck" in told["restore"] and "stuck" in told["restore dcp"]
        assert ".odd must be a" in told["odd"] and ".odd must be a" in told["odd dcp"]
        assert told["left"] == []
        assert "checkpoint-9 must be a checkpoint's folder" in told["gone"]
        assert "none must be a folder that dcp.save completed" in told["gone dcp"]
        assert "scheduler must be given" in told["check"]
    assert "process 1: " in first["odd"] and "process 1: " in first["check"] and "process 1: " in first["restore"]

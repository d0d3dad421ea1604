"""save_checkpoint and load_checkpoint: the run that goes on equals the one that never stopped, bit for bit."""

import copy
import errno
import json
import os
import random
import warnings

import numpy as np
import pytest
import torch
from models import batch
from torch import nn

import adaptlora
from adaptlora.checkpoint_files import MANIFEST
from adaptlora.encoding import decode, encode


class Net(nn.Module):
    """Two adapted layers, dropout, batch statistics, a norm that somebody may unfreeze, and a head trained whole."""

    def __init__(self, width=17):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(13, width)
        self.statistics = nn.BatchNorm1d(width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, 11)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(11, 3)

    def forward(self, x):
        x = self.norm(self.statistics(self.first(x)))
        return self.classifier(self.dropout(torch.relu(self.second(torch.relu(x)))))


CONFIGS = {
    "normal": adaptlora.NormALConfig(
        r=6, target_r=3, schedule="adaptive", min_steps=4, lambda_p=9.0, lambda_c=9.0, lora_dropout=0.1,
        target_modules=["first", "second"], modules_to_save=["classifier"],
    ),
    "lalora": adaptlora.LaLoRAConfig(
        r=6, contribution="fisher", ema=0.5, gamma=8.0, group_by="module", lora_dropout=0.1, target_modules=["first", "second"],
        modules_to_save=["classifier"],
    ),
    "nora": adaptlora.NoRAConfig(
        r=3, r_out=8, lora_dropout=0.1, target_modules=["first", "second"], modules_to_save=["classifier"]
    ),
}  # fmt: skip
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "capturable lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.01), foreach=False),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
}


class Loop:
    """A training loop with everything that a loop may have."""

    def __init__(self, method="normal", optimizer="adamw", seed=0, width=17):
        self.adapter = adaptlora.attach(Net(width), CONFIGS[method])
        model = self.adapter.model
        model.norm.requires_grad_(True)
        ups = [layer.lora_B for layer in self.adapter.layers.values()]
        rest = [p for p in self.adapter.parameters() if not any(p is up for up in ups)]
        groups = [{"params": rest}, {"params": ups, "weight_decay": 0.1}, {"params": list(model.norm.parameters())}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.adapter.track(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3, 6])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self.losses = []
        for start in (torch.manual_seed, random.seed, np.random.seed):
            start(seed)

    def step(self):
        x, labels = batch()
        order = torch.randperm(len(x))[: 16 + random.randrange(4)]
        x = x + 0.01 * float(np.random.randn())
        loss = nn.functional.cross_entropy(self.adapter.model(x[order]), labels[order])
        self.scaler.scale(loss + self.adapter.penalty()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.adapter.step(loss)
        self.scheduler.step()
        self.losses.append(loss.item())

    def parts(self):
        return self.adapter, self.optimizer

    def save(self, folder, **options):
        return adaptlora.save_checkpoint(
            folder, *self.parts(), step=len(self.losses), scheduler=self.scheduler, scaler=self.scaler, **options
        )

    def load(self, path):
        return adaptlora.load_checkpoint(path, *self.parts(), scheduler=self.scheduler, scaler=self.scaler)

    def state(self):
        """All that there is, as JSON text and tensors."""
        everything = {
            "adapter": self.adapter.state_dict(),
            "model": dict(self.adapter.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": [list(map(str, part)) if np.ndim(part) else part for part in np.random.get_state()],
        }
        tensors = {}
        return json.dumps(encode("state", "", everything, tensors)), tensors


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert found[1][name].dtype == tensor.dtype and found[1][name].shape == tensor.shape, name
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (found[1][name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_run_that_goes_on_is_the_run_that_never_stopped(method, optimizer, tmp_path):
    whole = Loop(method, optimizer)
    for _ in range(9):
        whole.step()
    for stop in (1, 4, 5, 7):
        first = Loop(method, optimizer)
        for _ in range(stop):
            first.step()
        before = first.state()
        path = first.save(tmp_path / str(stop), extra={"order": torch.arange(3), "seen": (1, float("nan"))})
        assert_same(first.state(), before)
        second = Loop(method, optimizer, seed=5)
        for _ in range(2):
            second.step()
        second.losses = list(first.losses)
        step, extra = second.load(path)
        assert step == stop and extra["order"].tolist() == [0, 1, 2] and extra["seen"][0] == 1
        assert_same(second.state(), before)
        while len(second.losses) < 9:
            second.step()
        assert second.losses == whole.losses
        assert_same(second.state(), whole.state())
    if method != "nora":
        assert set(whole.adapter.ranks().values()) != {6}


def test_the_optimizer_may_be_tracked_after_the_load(tmp_path):
    whole = Loop("lalora")
    for _ in range(4):
        whole.step()
    path = whole.save(tmp_path)
    late = adaptlora.attach(Net(), CONFIGS["lalora"])
    late.model.norm.requires_grad_(True)
    ups = [layer.lora_B for layer in late.layers.values()]
    rest = [p for p in late.parameters() if not any(p is up for up in ups)]
    groups = [{"params": rest}, {"params": ups, "weight_decay": 0.1}, {"params": list(late.model.norm.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    adaptlora.load_checkpoint(path, late, optimizer, scheduler=scheduler, scaler=scaler)
    late.track(optimizer)
    loop = copy.copy(whole)
    loop.adapter, loop.optimizer, loop.scheduler, loop.scaler = late, optimizer, scheduler, scaler
    loop.losses = list(whole.losses)
    for _ in range(3):
        loop.step()
    again = Loop("lalora")
    for _ in range(7):
        again.step()
    assert loop.losses == again.losses
    assert_same(loop.state(), again.state())


def plain():
    """An adapter without scheduler or scaler whose optimizer's state a test fills."""
    adapter = adaptlora.attach(Net(), adaptlora.LoraConfig(r=2, target_modules=["first"]))
    return adapter, torch.optim.SGD(adapter.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "value",
    [
        3, -(2**63), 2**64, -(3**99), 2.5, float("inf"), None, True, "text", torch.tensor(7, dtype=torch.uint8),
        torch.rand(5, 2, dtype=torch.float64),
        torch.rand(4, 3).t(), torch.rand(3).bfloat16(), torch.empty(0, 4), [torch.rand(2), (1, {"a": torch.rand(2)})], {7: 1.5},
        {"$tensor": 1},
    ],
)  # fmt: skip
def test_state_of_any_kind_keeps_its_type(value, tmp_path):
    adapter, optimizer = plain()
    p = adapter.factors()[0]
    optimizer.state[p]["kept"] = value
    path = adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=1)
    fresh, other = plain()
    adaptlora.load_checkpoint(path, fresh, other)
    found = other.state[fresh.factors()[0]]["kept"]
    assert type(found) is type(value)
    sides = [encode("state", "x", v, {}) for v in (found, value)]
    assert sides[0] == sides[1]
    if isinstance(value, torch.Tensor):
        assert torch.equal(found, value) and found.dtype == value.dtype and found.stride() == value.stride()


@pytest.mark.parametrize("value", [object(), torch.rand(3).to_sparse(), {1, 2}, np.zeros(2)])
def test_what_cannot_be_stored_is_named_and_nothing_written(value, tmp_path):
    adapter, optimizer = plain()
    optimizer.state[adapter.factors()[0]]["odd"] = value
    with pytest.raises(TypeError, match=r"save_checkpoint: optimizer state of first.*\.odd must be a"):
        adaptlora.save_checkpoint(tmp_path / "out", adapter, optimizer, step=1)
    assert not (tmp_path / "out").exists()


def test_old_ones_go_and_later_ones_are_named(tmp_path):
    adapter, optimizer = plain()
    for step in (1, 2, 3, 4):
        adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    with pytest.warns(UserWarning, match=r"holds \['checkpoint-4'\] of later steps than 3"):
        adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=3, extra="again", keep=None)
    assert adaptlora.load_checkpoint(tmp_path / "checkpoint-3", adapter, optimizer).extra == "again"
    assert adaptlora.last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_an_old_one_that_cannot_be_removed_stays_and_the_save_is_made(tmp_path, monkeypatch):
    adapter, optimizer = plain()
    adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=1)
    replace = os.replace

    def failing(source, target):
        if str(target).endswith(".dropped"):
            raise OSError(errno.EIO, "no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.warns(UserWarning, match="checkpoint-1 is older than the last 1 and stays"):
        path = adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=2, keep=1)
    assert adaptlora.last_checkpoint(tmp_path) == path and (tmp_path / "checkpoint-1").exists()


def test_what_killed_saves_left_is_removed_and_what_they_replaced_put_back(tmp_path):
    adapter, optimizer = plain()
    path = adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=3)
    path.rename(tmp_path / ".checkpoint-3.kept")
    for name in (
        f".checkpoint-4.{16 * 'a'}.adaptlora-tmp",
        ".checkpoint-4.original",
        ".checkpoint-1.dropped",
        ".checkpoint-mine",
        ".other",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    assert adaptlora.last_checkpoint(tmp_path) == path
    adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=4)
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == [".checkpoint-4.original", ".checkpoint-mine", ".other", "checkpoint-3", "checkpoint-4"]


def test_no_checkpoint(tmp_path):
    adapter, optimizer = plain()
    assert adaptlora.last_checkpoint(tmp_path) is None and adaptlora.last_checkpoint(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="load_checkpoint: .*checkpoint-1 must be a checkpoint's folder"):
        adaptlora.load_checkpoint(tmp_path / "checkpoint-1", adapter, optimizer)
    with pytest.raises(FileNotFoundError, match="check_checkpoint"):
        adaptlora.check_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("options", [{"step": -1}, {"step": True}, {"step": 1, "keep": 0}])
def test_bad_numbers(options, tmp_path):
    with pytest.raises(ValueError, match="save_checkpoint: (step|keep) must be an integer ≥"):
        adaptlora.save_checkpoint(tmp_path, *plain(), **options)


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="checkpoint-1 must be absent or a checkpoint of this function"):
        adaptlora.save_checkpoint(tmp_path, *plain(), step=1)
    assert (tmp_path / "checkpoint-1" / "thesis.tex").read_text() == "x"


def test_encoding_refuses_unknown_entries():
    with pytest.raises(ValueError, match="tensors must hold 'x'"):
        decode({"$tensor": "x"}, {})
    with pytest.raises(ValueError, match="must be one of"):
        decode({"$pickle": "x"}, {})


def test_a_checkpoint_holds_three_files_and_no_pickle(tmp_path):
    path = Loop().save(tmp_path)
    assert {file.name for file in path.iterdir()} == {MANIFEST, "state.json", "tensors.safetensors"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptlora.check_checkpoint(path)

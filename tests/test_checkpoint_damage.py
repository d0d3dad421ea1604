"""Damage of every kind is refused by name, and then nothing has changed."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import Loop, assert_same

import adaptlora
from adaptlora.checkpoint_files import LOOP, MANIFEST, write_manifest
from adaptlora.distributed.torch_checkpoint import AdapterState, load_distributed

FILES = (MANIFEST, "state.json", "tensors.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("saved")
    loop = Loop()
    for _ in range(2):
        loop.step()
        loop.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "out")
    return tmp_path / "out"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def empty(file):
    file.write_bytes(b"")


def remove(file):
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty, remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_found(name, damage, folder):
    path = folder / "checkpoint-2"
    damage(path / name)
    with pytest.raises(ValueError, match="checkpoint-2"):
        adaptlora.check_checkpoint(path)
    with pytest.warns(UserWarning, match=f"checkpoint-1 is the latest whole checkpoint: .*checkpoint-2/.*{name}"):
        assert adaptlora.last_checkpoint(folder) == folder / "checkpoint-1"
    loop = Loop()
    before = loop.state()
    with pytest.raises(ValueError, match=f"load_checkpoint: .*{name}.*last_checkpoint"):
        loop.load(path)
    assert_same(loop.state(), before)


def test_every_byte_counts(folder):
    """In the manifest, which no checksum covers, every flipped bit is seen, too."""
    file = folder / "checkpoint-2" / MANIFEST
    whole = file.read_bytes()
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError, match="checkpoint-2"):
            adaptlora.check_checkpoint(file.parent)


def rewrite(path, change):
    """The state with a change, under a manifest that vouches for it."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path, LOOP, 2, FILES[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step=3), "must hold .* of step 2"),
        (lambda s: s.update(extra=float("nan")), "state.json must be JSON: numbers must be finite, got NaN"),
        (lambda s: s.pop("random"), "must hold"),
        (lambda s: s["adapter"].update(scalings={"$tensor": "gone"}), "must hold 'gone'"),
        (lambda s: s["adapter"]["scalings"].update(first="big"), "scalings must give first a finite number"),
        (lambda s: s["adapter"].pop("parked"), r"state must hold .*difference in \['parked'\]"),
        (lambda s: s["adapter"].pop("factors"), "factors must have the names that were saved, .*'first'"),
        (lambda s: s["adapter"]["method"].pop("t"), "method must have the adapter's entries"),
        (lambda s: s["optimizer"]["groups"].pop(), "must have 2 parameter groups, got 3"),
        (lambda s: s["optimizer"]["groups"][0]["params"].pop(), "optimizer group 0 must hold the"),
        (lambda s: s["optimizer"].update({"class": "x.Lion"}), "optimizer must be a x.Lion, got a torch.optim.adamw"),
        (lambda s: s["scheduler"].update({"class": "x.Cosine"}), "scheduler must be a x.Cosine"),
        (lambda s: s.pop("scaler"), "scaler must be None: none was saved"),
        (
            lambda s: s["scaler"].update(state={}),
            "scaler must be disabled, as it was when it was saved, got one that is enabled",
        ),
        (lambda s: s.update(config="LaLoRAConfig"), "must be attached with a LaLoRAConfig, got a NormALConfig"),
        (lambda s: s["random"].update(python=[3]), "unpack|state"),
    ],
)
def test_other_content_is_refused_and_nothing_changes(change, message, folder):
    path = folder / "checkpoint-2"
    rewrite(path, change)
    loop = Loop(seed=3)
    for _ in range(4):
        loop.step()
    before = loop.state()
    with pytest.raises((ValueError, TypeError), match=message):
        loop.load(path)
    assert_same(loop.state(), before)


def test_one_from_before_there_were_statistics_goes_on_bit_for_bit(folder):
    path = folder / "checkpoint-2"
    rewrite(path, lambda state: state["adapter"].pop("statistics"))
    whole = Loop()
    for _ in range(5):
        whole.step()
    expected = whole.state()
    resumed = Loop(seed=3)
    resumed.load(path)
    for _ in range(3):
        resumed.step()
    assert_same(resumed.state(), expected)


@pytest.fixture(scope="module")
def dcp_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp") / "saved"
    loop = Loop()
    loop.step()
    content = AdapterState(*loop.parts(), scheduler=loop.scheduler, scaler=loop.scaler, extra={"epoch": [1, 2]})
    dcp.save({"adapter": content}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b'"extra": {"epoch": [1',
            b'"extra": {"$poch": [1',
            r"adapter.state must be what AdapterState gives: .*\$poch",
        ),
        (b'"$tensor": "random.', b'"$tensor": "rundom.', "adapter.state must be what AdapterState gives: .*rundom"),
        (b'"factors"', b'"factorz"', "factors must have the names that were saved"),
        (b'"python"', b'"pythom"', "adapter.state must be what AdapterState gives: KeyError"),
        (b'"groups": [{', b'"groupz": [{', "adapter.state must be what AdapterState gives: KeyError"),
        (b'"groups": {', b'"groupz": {', r"difference in \['groupz'\]"),
        (b'"seen": []', b'"seem": []', "groups must be what a state holds of them, got KeyError"),
        (b'"statistics"', b'"statisticz"', r"difference in \['statisticz'\]"),
    ],
)
def test_json_of_dcp_that_was_not_saved_so_is_named_and_nothing_changes(old, new, message, dcp_saved, tmp_path):
    folder = shutil.copytree(dcp_saved, tmp_path / "out")
    (file,) = folder.glob("*.distcp")
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    loop = Loop(seed=3)
    loop.step()
    before = loop.state()
    with pytest.raises(ValueError, match=f"load_distributed: .*out: .*{message}"):
        load_distributed(folder, *loop.parts(), scheduler=loop.scheduler, scaler=loop.scaler)
    assert_same(loop.state(), before)


def test_json_of_dcp_is_bytes(tmp_path):
    dcp.save({"adapter": {"state": torch.ones(3), "tensors": {}}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(
        ValueError, match=r"adapter.state must be .* a vector of uint8, got torch.float32 of shape \(3,\)"
    ):
        load_distributed(tmp_path, *Loop().parts())


def test_another_model_optimizer_or_dtype_is_refused(folder):
    for loop, message in (
        (Loop(width=19), "must have shape"),
        (Loop(optimizer="momentum"), "optimizer must be a torch.optim.adamw.AdamW"),
        (Loop("nora"), "must be attached with a NormALConfig"),
    ):
        before = loop.state()
        with pytest.raises(ValueError, match=f"load_checkpoint: .*{message}"):
            loop.load(folder / "checkpoint-2")
        assert_same(loop.state(), before)
    double = Loop()
    for layer in double.adapter.layers.values():
        layer.pair.double()
    with pytest.raises(ValueError, match="must be of torch.float32, got torch.float64"):
        double.load(folder / "checkpoint-2")


def test_what_fails_last_is_undone_too(folder, monkeypatch):
    loop = Loop(seed=3)
    for _ in range(6):
        loop.step()
    before = loop.state()
    monkeypatch.setattr(loop.scaler, "load_state_dict", lambda state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.load(folder / "checkpoint-1")
    assert_same(loop.state(), before)


def test_the_step_is_the_folders(folder):
    (folder / "checkpoint-2").rename(folder / "checkpoint-7")
    with pytest.raises(ValueError, match="must be of step 7, as the folder's name says, got 2"):
        adaptlora.check_checkpoint(folder / "checkpoint-7")
    (folder / "checkpoint-7").rename(folder / "best")
    assert Loop().load(folder / "best").step == 2


def test_a_newer_format_is_named(folder):
    file = folder / "checkpoint-2" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2, "new": 1}))
    with pytest.raises(ValueError, match=r"must be of format 1 at most, got 2 \(a newer adaptlora wrote it: upgrade\)"):
        Loop().load(file.parent)


def test_a_failed_save_leaves_what_was_there(folder, monkeypatch):
    loop = Loop()
    loop.load(folder / "checkpoint-2")
    loop.losses = [0.0, 0.0]
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("checkpoint-2") and ".kept" not in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        loop.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    adaptlora.check_checkpoint(folder / "checkpoint-2")

"""
Saves that fail or die at any call: the folder loads as the old adapter or the new one, bit for bit, and the next save cleans up.

Faults go by number: the n-th os.replace, os.fsync, … raises OSError, or ends a forked child, for every n until a save comes through.
"""

import errno
import functools
import itertools
import json
import os
import shutil
import sys

import peft
import pytest
import torch
from models import Net, randomise, task_loss
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptlora
from adaptlora import adapter_folder, io, lora_files, nora_files, tensor_files
from adaptlora.rank_history import RankHistory

KINDS = ["history", "nora", "nora, then peft", "peft, then nora", "shear", "kohya"]
DISK = [(os, "replace"), (os, "fsync"), (os, "unlink"), (tensor_files, "open")]


def plain(i):
    adapter = adaptlora.attach(
        Net(), adaptlora.LoraConfig(r=3 + i, lora_alpha=5 + 2 * i, target_modules=["first", "second"])
    )
    randomise(adapter, seed=i)
    return adapter


def nested(i):
    adapter = adaptlora.attach(Net(), adaptlora.NoRAConfig(r=2 + i, r_out=6, target_modules=["first", "second"]))
    randomise(adapter, seed=i)
    return adapter


def grown(i):
    adapter = adaptlora.attach(
        Net(), adaptlora.LaLoRAConfig(r=4 + i, target_modules=["first", "second"], group_by="module")
    )
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    adapter.track(optimizer)
    for t in range(2 + i):
        task_loss(adapter.model, seed=t).backward()
        optimizer.step()
        adapter.step()
    return adapter


def kohya_writer(i):
    tensors = {
        "lora_unet_x.lora_down.weight": torch.randn(3 + i, 5),
        "lora_unet_x.lora_up.weight": torch.randn(7, 3 + i),
    }

    def write(out):
        source = out.with_name(f"source{i}.safetensors")
        if not source.exists():
            save_file(tensors | {"lora_unet_x.alpha": torch.tensor(2.0 + i)}, source)
        file = lora_files.read(source)
        file.write(out / "out.safetensors", file.modules)

    return write


def sheared_writer(i):
    adapter = plain(i)

    def write(out):
        source = out.with_name(f"source{i}")
        if not source.exists():
            adapter.save(source)
        file = lora_files.read(source)
        file.write(out, file.modules)

    return write


def writers(kind):
    """Two saves, as functions of a folder, whose adapters differ in everything."""
    if kind == "history":
        return [grown(0).save, plain(1).save, grown(1).save]
    if kind in ("shear", "kohya"):
        return [{"shear": sheared_writer, "kohya": kohya_writer}[kind](i) for i in (0, 1)]
    formats = {"nora": ["nora", "nora"], "nora, then peft": ["nora", "peft"], "peft, then nora": ["peft", "nora"]}[kind]
    return [functools.partial(nested(i).save, format=format_) for i, format_ in enumerate(formats)]


def state(folder):
    """All that a folder says, to the bit, by our loaders; None for an empty one."""
    single = folder / "out.safetensors"
    if single.exists():
        file = lora_files.read(single)
        return {name: (m.lora_A.tolist(), m.lora_B.tolist(), m.scaling) for name, m in file.modules.items()}
    if not any(not name.startswith(".") for name in os.listdir(folder)):
        return None
    stored, history = io.read(folder), RankHistory.read(folder)
    factors = {name: [factor.tolist() for factor in pair] for name, pair in stored.factors.items()}
    return type(stored).__name__, factors, stored.scalings, history


def faulty(patch, n, error=None, only=None):
    """The n-th call of a function that changes the disk raises `error`, or else ends the process before it.  Returns: [n] once it came."""
    calls, reached = [], []

    def wrapped(real):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) != n:
                return real(*args, **kwargs)
            reached.append(n)
            if error is None:
                os._exit(9)
            raise OSError(error, os.strerror(error))

        return call

    for module, name in [place for place in DISK if only in (None, place[1])]:
        patch.setattr(module, name, wrapped(getattr(module, name, open)), raising=False)
    return reached


def in_child(work):
    """Exit status of a forked child: 0, 9 where it was killed, 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("how", ["error", "killed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_stops_anywhere_leaves_one_whole_adapter(kind, how, tmp_path):
    saves = writers(kind)
    wholes = [tmp_path / f"whole{i}" for i in range(len(saves))]
    for save, whole in zip(saves, wholes, strict=True):
        whole.mkdir()
        save(whole)
    states = [state(whole) for whole in wholes]
    folder = tmp_path / "folder"
    for new, save in enumerate(saves):
        before = states[new - 1] if new else None
        for n in itertools.count(1):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(wholes[new - 1], folder) if new else folder.mkdir()
            stop = functools.partial(killed, save, folder, n)
            done = raises(save, folder, n) if how == "error" else in_child(stop) == 0
            found = state(folder)
            assert found == states[new] or (found == before and not done), n
            if any(name.startswith(".") for name in os.listdir(folder)):
                save(folder)
                assert state(folder) == states[new]
                assert sorted(os.listdir(folder)) == sorted(os.listdir(wholes[new])), n
            if done:
                break
        assert n > 5


def raises(save, folder, n):
    """Whether a save whose n-th call fails came to its end without it."""
    with pytest.MonkeyPatch.context() as patch:
        reached = faulty(patch, n, errno.ENOSPC)
        try:
            save(folder)
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.filename.startswith(str(folder))
        return not reached


def killed(save, folder, n):
    with pytest.MonkeyPatch.context() as patch:
        faulty(patch, n)
        save(folder)


def test_the_moment_of_the_change(tmp_path):
    """A kill between the two renames: unseen by us, and mended for stock PEFT by whoever of us looks first."""
    first, second = plain(0), plain(1)
    first.save(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        assert in_child(lambda: (faulty(patch, 3, only="replace"), second.save(tmp_path))) == 9
    waiting = [name for name in os.listdir(tmp_path) if name.startswith(".adapter_config.json.")]
    assert len(waiting) == 1 and json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    shutil.copytree(tmp_path, tmp_path / "read-only")
    loaded = adaptlora.load(Net(), tmp_path)
    assert set(loaded.ranks().values()) == {4} and waiting[0] not in os.listdir(tmp_path)
    peft.PeftModel.from_pretrained(Net(), tmp_path)

    # where nothing may be renamed the file is read from where it waits
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert state(tmp_path / "read-only") == state(tmp_path)
    assert waiting[0] in os.listdir(tmp_path / "read-only")


def test_a_configuration_that_the_user_edited_is_taken_as_it_is(tmp_path):
    plain(0).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 30}))
    assert adaptlora.load(Net(), tmp_path).layers["first"].scaling == 10
    waiting = tmp_path / f".adapter_config.json.{'0' * 64}"
    waiting.write_text("{}")  # of another save
    assert adaptlora.load(Net(), tmp_path).layers["first"].scaling == 10
    own = json.loads(safe_open(tmp_path / "adapter_model.safetensors", "pt").metadata()["adaptlora_files"])
    cut = tmp_path / f".adapter_config.json.{own['adapter_config.json']}"
    cut.write_text("{")  # never reached the disk
    assert adaptlora.load(Net(), tmp_path).layers["first"].scaling == 10
    plain(1).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_holds_one_adapter(tmp_path):
    grown(0).save(tmp_path)
    assert (tmp_path / io.HISTORY_FILE).exists()
    nested(0).save(tmp_path, format="nora")
    assert sorted(os.listdir(tmp_path)) == sorted([nora_files.CONFIG_FILE, nora_files.WEIGHTS_FILE])
    (tmp_path / "README.md").write_text("mine")
    sheared_writer(0)(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    from adaptlora.files import temporary_file

    assert in_child(lambda: (temporary_file(tmp_path / "adapter_model.safetensors").__enter__(), os._exit(0))) == 0
    assert os.listdir(tmp_path)[0].endswith(".adaptlora-tmp")
    foreign = [".adapter_model.safetensors.bak_0001", ".adapter_config.json.original", ".tmpab12cd"]
    for name in foreign:
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == 4
    with temporary_file(tmp_path / "adapter_model.safetensors") as living:
        plain(0).save(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(
            [*foreign, living.name, "adapter_config.json", "adapter_model.safetensors"]
        )


def test_bytes_are_safetensors_own_and_the_same_every_time(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).t(),
        "a": torch.tensor(2.5),
        "ü": torch.randn(4, dtype=torch.bfloat16),
        "n": torch.arange(3),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "c": torch.randn(2, dtype=torch.complex64),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    tensor_files.save_file(tensors, tmp_path / "ours", {"format": "pt"})
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys() and all(torch.equal(found[k].cpu(), tensors[k]) for k in tensors if k != "f8")
    with pytest.raises(TypeError, match="x must be of one of .*, got torch.complex128"):
        tensor_files.save_file({"x": torch.ones(1, dtype=torch.complex128)}, tmp_path / "ours")
    for name in ("one", "two"):
        plain(0).save(tmp_path / name)
    assert adapter_folder.FILES[1] in os.listdir(tmp_path / "one")
    assert all(
        (tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in os.listdir(tmp_path / "one")
    )


def test_shearing_that_dies_anywhere_goes_on_to_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "matplotlib", None
    )  # pictures take most of the time, and are written by `atomic_file`
    adapter = adaptlora.attach(Net(), adaptlora.LoraConfig(r=3, target_modules=["second"]))
    randomise(adapter)
    adapter.save(tmp_path / "adapter")
    out, whole = tmp_path / "out", tmp_path / "whole"

    def shear(folder):
        adaptlora.shear_files(tmp_path / "adapter", folder, adaptlora.SVDConfig(rank=2), workers=1)

    shear(whole)
    for n in itertools.count(1):
        if (done := in_child(functools.partial(killed, shear, out, n)) == 0) is False:
            assert not out.exists() or state(out) in (None, state(whole)), n
            shear(out)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), n
        assert sorted(os.listdir(out)) == sorted(os.listdir(whole)), n
        assert sorted(os.listdir(tmp_path)) == ["adapter", "out", "whole"], n
        if done:
            break
        shutil.rmtree(out)
    assert n > 20

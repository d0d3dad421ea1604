"""Full, read-only and vanished disks, files of every wrong kind, savers side by side, adapters on adapters: refused or whole."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Net, randomise, task_loss
from safetensors.torch import load_file, save_file
from test_save_faults import grown, in_child, plain, state

import adaptlora
from adaptlora import lora_files
from adaptlora.base_weights import BaseWeights
from adaptlora.files import locked, make_folder
from adaptlora.inspection import inspect_adapter
from adaptlora.targets import check_expressions

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def alarm():
    """Nothing here may wait for anything."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def edit(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Disks


def assert_refused(save, folder, code, before):
    with pytest.raises(OSError) as caught:
        save(folder)
    assert caught.value.errno == code and str(folder) in str(caught.value), caught.value
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("size", [500, 2000, 2600])
def test_a_file_size_limit_leaves_the_old_adapter(size, tmp_path):
    """Whichever file meets it: the weights' header, their numbers or the configuration."""
    plain(0).save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    large = adaptlora.attach(Net(), adaptlora.LoraConfig(r=13, target_modules=["first", "second"]))

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        assert_refused(large.save, tmp_path, errno.EFBIG, before)

    assert in_child(limited) == 0


def mounted(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("needs the right to mount a tmpfs")


def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    disk = tmp_path / "disk"
    mounted(disk, "size=64k")
    try:
        folder = disk / "adapter"
        plain(0).save(folder)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        large = adaptlora.attach(Net(), adaptlora.LoraConfig(r=900, target_modules=["first", "second"]))
        assert_refused(large.save, folder, errno.ENOSPC, before)
        plain(1).save(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert_refused(plain(0).save, folder, errno.EROFS, before)
        assert set(adaptlora.load(Net(), folder).ranks().values()) == {4}
        with pytest.raises(OSError, match="Read-only file system"):
            plain(0).save(disk / "new")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to become another user")
def test_a_folder_of_another_user():
    with tempfile.TemporaryDirectory() as parent:  # tmp_path lies in folders that only one user may enter
        os.chmod(parent, 0o755)
        as_another_user(Path(parent) / "adapter")


def as_another_user(folder):
    plain(0).save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def other_user():
        os.setuid(65534)
        assert_refused(plain(1).save, folder, errno.EACCES, before)
        assert set(adaptlora.load(Net(), folder).ranks().values()) == {3}

    assert in_child(other_user) == 0
    (folder / WEIGHTS).chmod(0o600)

    def may_not_read():
        os.setuid(65534)
        with pytest.raises(PermissionError, match=WEIGHTS):
            adaptlora.load(Net(), folder)

    assert in_child(may_not_read) == 0


def test_other_things_in_the_place_of_the_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "inside"):
        with pytest.raises(NotADirectoryError, match="file"):
            plain(0).save(place)
    assert file.read_text() == "mine"
    real = tmp_path / "real"
    make_folder(real)
    (tmp_path / "link").symlink_to(real)
    plain(0).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(real)) == [CONFIG, WEIGHTS]
    blob = tmp_path / "blob"
    (real / WEIGHTS).rename(blob)
    (real / WEIGHTS).symlink_to(blob)
    old = blob.read_bytes()
    plain(1).save(real)
    assert blob.read_bytes() == old and not (real / WEIGHTS).is_symlink()  # the link is replaced, never written through
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="nowhere"):
        plain(0).save(tmp_path / "nowhere")


def test_a_folder_that_vanishes_during_the_save(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    real = os.fsync

    def vanish(handle):
        shutil.rmtree(folder, ignore_errors=True)
        real(handle)

    monkeypatch.setattr(os, "fsync", vanish)
    with pytest.raises(FileNotFoundError, match=str(folder)):
        plain(0).save(folder)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_stays_locked(tmp_path, monkeypatch):
    plain(0).save(tmp_path)
    monkeypatch.setattr("adaptlora.files._PATIENCE", 0.05)
    with locked(tmp_path):
        for work in (plain(1).save, lambda path: adaptlora.load(Net(), path)):
            with pytest.raises(TimeoutError, match="locked by another process for 0.05 s"):
                work(tmp_path)
    assert set(adaptlora.load(Net(), tmp_path).ranks().values()) == {3}


# Files of the wrong kind


KINDS = {
    "empty": lambda file: file.write_bytes(b""),
    "folder": lambda file: file.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "loop": lambda file: file.symlink_to(file.name),
    "pickle": lambda file: torch.save({"a": torch.ones(2)}, file),
    "utf-16": lambda file: file.write_text('{"r": 3}', encoding="utf-16"),
    "latin-1": lambda file: file.write_bytes(b'{"r\xff": 3}'),
    "deep": lambda file: file.write_text('{"a":' * 100_000),
    "deep list": lambda file: file.write_text("[" * 100_000 + "]" * 100_000),
    "huge integer": lambda file: file.write_text('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}"),
    "huge float": lambda file: file.write_text('{"peft_type": "LORA", "r": 1e400}'),
    "not a number": lambda file: file.write_text('{"peft_type": "LORA", "r": NaN}'),
    "twice": lambda file: file.write_text('{"peft_type": "LORA", "r": 3, "r": 4}'),
    "sparse": lambda file: (file.touch(), os.truncate(file, 1 << 40)),
}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "rank_history.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_wrong_kind(kind, name, tmp_path):
    (grown if name == "rank_history.json" else plain)(0).save(tmp_path)
    (tmp_path / name).unlink()
    KINDS[kind](tmp_path / name)
    readers = [inspect_adapter]
    if name != "rank_history.json":
        readers += [lora_files.read, lambda path: adaptlora.load(Net(), path), plain(1).load]
    for read in readers:
        if kind == "loop" and name == "rank_history.json":
            continue  # what is not there is no history
        with pytest.raises((ValueError, OSError), match=name) as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_a_pickle_alone_is_refused_and_not_run(tmp_path):
    plain(0).save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(
        FileNotFoundError, match=f"{WEIGHTS} is missing .only safetensors .* adapter_model.bin is a pickle"
    ):
        adaptlora.load(Net(), tmp_path)
    assert not os.path.exists("ran")


def header(entries, length=None, data=b""):
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HEADERS = {
    "a billion elements": header(
        {"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}, data=b"1234"
    ),
    "negative": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, data=b"1234"),
    "overlapping": header({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "xy"}, data=b"12345678"),
    "length": header({}, length=1 << 63),
    "dtype": header({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, data=b"1234"),
    "overflow": header({"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}),
    "long name": header({"x" * 2000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, data=b"1234"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, tmp_path):
    plain(0).save(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(HEADERS[name])
    with pytest.raises(ValueError, match=f"{WEIGHTS}"):
        adaptlora.load(Net(), tmp_path)


def test_ranks_that_no_file_holds(tmp_path):
    plain(0).save(tmp_path)
    edit(tmp_path, r=10**9)
    with pytest.raises(ValueError, match="must have the rank that adapter_config.json gives, 1000000000, got 3"):
        adaptlora.load(Net(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for key in tensors:
        tensors[key] = torch.empty((10**9, 0) if "lora_A" in key else (0, 10**9))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"must hold lora_A \(R, K\) and lora_B \(N, R\) of one rank"):
        adaptlora.load(Net(), tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    plain(0).save(folder)
    return folder, json.loads((folder / CONFIG).read_text())


@given(
    field=st.sampled_from(sorted({*peft.LoraConfig().to_dict(), "lora_bias", "adaptlora"})),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.sampled_from(["(a+)+$", "first"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    ),
)
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value_in_any_field(field, value, whole):
    folder, config = whole
    (folder / CONFIG).write_text(json.dumps(config | {field: value}))
    model = Net()
    try:
        adaptlora.load(model, folder)
    except ValueError as error:
        assert str(folder) in str(error)
        assert type(model.first) is torch.nn.Linear


EXPRESSIONS = [
    "(a+)+$",
    "(.*)*x",
    "(a|a)*b",
    "(a|ab)+",
    "(a?){40}b",
    "a?" * 50 + "a" * 50,
    ".*" * 7,
    "(" * 3000 + ")" * 3000,
    "[",
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_expressions_that_take_forever(field, expression, tmp_path):
    plain(0).save(tmp_path)
    edit(tmp_path, **{field: {expression: 3}})
    with pytest.raises(ValueError, match=rf"{CONFIG}: {field} must (be a regular|have regular|need at most)"):
        adaptlora.load(Net(), tmp_path)


def test_expressions_that_people_write():
    names = [f"base.model.layers.{i}.self_attn.{x}_proj" for i in range(80) for x in "qkvo"]
    check_expressions("load", "file", [
        "q_proj", r"^model\.layers\.1\.mlp", r".*layers\.(0|1|2|10|31)\..*\.(q|k)_proj", r".*a.*b.*c", "|".join(names),
        r"(?:model\.)?layers\.(?:[0-9]|1[0-9])\.(?:self_attn|mlp)\..*", r"layers\.[0-9]+\.(?!mlp).*", "(?:ab){2}", *names,
    ], names)  # fmt: skip


def test_an_expression_that_no_file_may_hold_is_saved_as_names(tmp_path):
    adapter = adaptlora.attach(Net(), adaptlora.NoRAConfig(r=2, r_out=6, target_modules=r"((first|second))+"))
    adapter.save(tmp_path, format="nora")
    assert adaptlora.load(Net(), tmp_path).ranks() == adapter.ranks()


def test_an_index_names_files_beside_it_alone(tmp_path):
    folder, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file({"x.weight": torch.ones(2, 3)}, blobs / "abc.safetensors")
    (blobs / "abc.safetensors").rename(blobs / "abc")
    (folder / "model-1.safetensors").symlink_to("../../blobs/abc")  # as Hugging Face's cache has it
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x.weight": "model-1.safetensors"}}))
    assert BaseWeights(folder).shape("x") == (2, 3)
    for name in (
        "/etc/x.safetensors",
        "../x.safetensors",
        "a/../../x.safetensors",
        "a\\x.safetensors",
        "model-1.bin",
        3,
    ):
        index.write_text(json.dumps({"weight_map": {"x.weight": name}}))
        with pytest.raises(ValueError, match="weight_map must name .safetensors files beside it"):
            BaseWeights(folder)
    for config in ('{"text_config": 3}', "[" * 100_000, "[]"):
        (folder / "config.json").write_text(config)
        with pytest.raises(ValueError, match="base: .*config.json"):
            BaseWeights(folder)


# One adapter on another, and loads into a training


def test_a_second_adapter_is_refused_before_anything_changes():
    config = adaptlora.LoraConfig(r=2, target_modules=["first"])
    ours = adaptlora.attach(Net(), config).model
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["first"]))
    for model in (ours, theirs):
        before = {name: (type(m), id(m)) for name, m in model.named_modules()}
        trains = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="attach: model must not be adapted already; '.*first' is a"):
            adaptlora.attach(model, adaptlora.LoraConfig(r=2, target_modules=["second"]))
        assert before == {name: (type(m), id(m)) for name, m in model.named_modules()}
        assert trains == {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="LoraLinear"):
        peft.get_peft_model(ours, peft.LoraConfig(r=2, target_modules=["first"]))
    assert type(ours.first).__name__ == "LoraLinear"


def test_a_failed_load_leaves_a_training_as_it_was(tmp_path):
    saved = {"r": 3, "target_modules": ["first", "second"], "modules_to_save": ["classifier"]}
    good = adaptlora.attach(Net(), adaptlora.LoraConfig(**saved))
    randomise(good)
    good.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    trainings = [adaptlora.attach(Net(), adaptlora.LoraConfig(**saved | {"r": 2})) for _ in range(2)]
    optimizers = [torch.optim.AdamW(adapter.parameters(), lr=0.1) for adapter in trainings]
    faults = [
        lambda t: t.pop("base_model.model.classifier.bias"),
        lambda t: t.update({"base_model.model.classifier.weight": torch.zeros(3, 12)}),
        lambda t: t.update({"base_model.model.second.lora_B.weight": torch.zeros(12, 3)}),
        lambda t: t.update({"base_model.model.second.lora_B.weight": torch.full((11, 3), torch.inf)}),
        lambda t: t.pop("base_model.model.first.lora_A.weight"),
    ]
    for adapter, optimizer in zip(trainings, optimizers, strict=True):
        adapter.track(optimizer)
        for t, fault in enumerate(faults):
            task_loss(adapter.model, seed=t).backward()
            optimizer.step()
            adapter.step()
            if adapter is trainings[1]:
                broken = dict(tensors)
                fault(broken)
                save_file(broken, tmp_path / WEIGHTS)
                with pytest.raises(ValueError, match=f"load: {tmp_path}"):
                    adapter.load(tmp_path)
    for mine, theirs in zip(*(adapter.parameters() for adapter in trainings), strict=True):
        assert torch.equal(mine, theirs)
    states = [[s["exp_avg"] for s in o.state.values()] for o in optimizers]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*states, strict=True))


# Savers side by side


def test_two_processes_and_four_threads_into_one_folder(tmp_path):
    adapters = [plain(0), plain(1)]
    folder = tmp_path / "adapter"
    states = []
    for i, adapter in enumerate(adapters):
        adapter.save(tmp_path / f"whole{i}")
        states.append(state(tmp_path / f"whole{i}"))
    adapters[0].save(folder)
    failures = []

    def saver(i, rounds=13):
        try:
            for _ in range(rounds):
                adapters[i].save(folder)
        except Exception as error:
            failures.append(error)

    def process():
        threads = [threading.Thread(target=saver, args=(i % 2,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    children = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            try:
                process()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    reads = 0
    while reads < 50 or any(children):
        assert state(folder) in states
        reads += 1
        for k, pid in enumerate(children):
            if pid and os.waitpid(pid, os.WNOHANG)[0]:
                children[k] = 0
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    first, second = (json.loads((tmp_path / f"whole{i}" / CONFIG).read_text()) for i in (0, 1))
    assert json.loads((folder / CONFIG).read_text()) in (first, second)

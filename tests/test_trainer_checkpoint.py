"""Trainer's checkpoints: sealed, checked, and found again after damage and kills."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from models import bert_batch, tiny_bert
from transformers import Trainer, TrainingArguments

import adaptlora
from adaptlora.checkpoint_files import MANIFEST
from adaptlora.integrations import trainer_checkpoint

WRITTEN = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def run(folder, *, resume=None, **arguments):
    config = adaptlora.NormALConfig(r=4, target_r=2, t_p=2, t_c=3, target_modules="all-linear")
    adapter = adaptlora.attach(tiny_bert(), config)
    data = bert_batch(size=16)
    trainer = Trainer(
        adapter.model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=[{key: value[i] for key, value in data.items()} for i in range(16)],
        callbacks=[adapter.callback()],
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer") / "saved"
    run(folder)
    for step in (1, 2, 3, 4):
        manifest = json.loads((folder / f"checkpoint-{step}" / MANIFEST).read_text())
        assert (
            manifest["kind"] == "transformers" and {*WRITTEN, "adapter/adapter_config.json"} <= manifest["files"].keys()
        )
    return folder


@pytest.fixture(params=["sealed", "unsealed"])
def folder(saved, tmp_path, request):
    """checkpoint-1 … checkpoint-4, with their seals or, as after a kill, without."""
    shutil.copytree(saved, tmp_path / "out")
    if request.param == "unsealed":
        for file in (tmp_path / "out").glob(f"checkpoint-*/{MANIFEST}"):
            file.unlink()
    return tmp_path / "out"


@pytest.mark.parametrize("name", WRITTEN)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_found(name, folder):
    file = folder / "checkpoint-4" / name
    for content in (file.read_bytes()[:-9], b"", None):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint-4/{name}"):
            adaptlora.check_checkpoint(file.parent)
        with pytest.warns(UserWarning, match=f"checkpoint-3 is the latest whole .*{name}"):
            assert adaptlora.last_checkpoint(folder) == folder / "checkpoint-3"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_flipped_byte_is_seen_without_a_seal_too(name, folder):
    file = folder / "checkpoint-4" / name
    data = bytearray(file.read_bytes())
    data[data.index(b"PK", 4) - 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=name):
        adaptlora.check_checkpoint(file.parent)


def test_a_whole_one_is_found_and_the_step_is_the_folders(folder):
    assert adaptlora.last_checkpoint(folder) == folder / "checkpoint-4"
    (folder / "checkpoint-4").rename(folder / "checkpoint-9")
    with pytest.raises(ValueError, match="must be of step 9, as the folder's name says, got 4"):
        adaptlora.check_checkpoint(folder / "checkpoint-9")


def test_sealing_leaves_trainers_order_of_age(saved, tmp_path):
    path = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    (path / MANIFEST).unlink()
    os.utime(path, (1e9, 1e9))
    trainer_checkpoint.seal(path, first=False)
    assert not (path / MANIFEST).exists()
    trainer_checkpoint.seal(path)
    assert path.stat().st_mtime == 1e9
    names = json.loads((path / MANIFEST).read_text())["files"]
    assert {*WRITTEN, "adapter/adapter_model.safetensors"} <= names.keys() and MANIFEST not in names


def test_resuming_from_a_damaged_one_is_refused_and_another_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "out")
    # Trainer reads this file without a complaint.
    file = folder / "checkpoint-4" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with (
        pytest.raises(ValueError, match="checkpoint-4 cannot be resumed from: .*resume from .*checkpoint-3'"),
        pytest.warns(UserWarning, match="last_checkpoint"),
    ):
        run(folder, resume=folder / "checkpoint-4")


def test_resuming_without_an_optimizer_is_refused(folder):
    path = folder / "checkpoint-2"
    (path / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-2/optimizer.pt is missing.*resume from .*checkpoint-4'"):
        run(folder, resume=path)
    elsewhere = path.rename(folder.parent / "checkpoint-2")
    with pytest.raises(ValueError, match="the checkpoint of step 2 must hold optimizer.pt and scheduler.pt"):
        run(folder, resume=elsewhere)


def test_weights_alone_cannot_be_resumed(tmp_path):
    run(tmp_path, save_only_model=True)
    with pytest.raises(ValueError, match="is missing: the checkpoint cannot be resumed exactly .save_only_model"):
        adaptlora.check_checkpoint(tmp_path / "checkpoint-4")
    with pytest.warns(UserWarning, match="none is the latest whole"):
        assert adaptlora.last_checkpoint(tmp_path) is None


def test_what_a_kill_left_unsealed_is_sealed_before_it_is_written_over(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "out")
    for step in (2, 3, 4):
        (folder / f"checkpoint-{step}" / MANIFEST).unlink()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    stored = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    state = SimpleNamespace(global_step=3, stateful_callbacks=stored["stateful_callbacks"])
    trainer_checkpoint.check_resumed(folder, state)
    assert [(folder / f"checkpoint-{step}" / MANIFEST).exists() for step in (1, 2, 3, 4)] == [True, False, True, False]


def test_trainers_checkpoint_is_not_for_a_loop_of_ones_own(saved):
    adapter = adaptlora.attach(tiny_bert(), adaptlora.LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="is Trainer's: give it to trainer.train"):
        adaptlora.load_checkpoint(saved / "checkpoint-4", adapter, optimizer)
    own = adaptlora.save_checkpoint(saved.parent / "own", adapter, optimizer, step=1)
    with pytest.raises(ValueError, match="must be of a checkpoint of Trainer's, got one of 'loop'"):
        trainer_checkpoint.check(own)


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors.index.json"])
def test_json_of_any_depth_is_refused_by_name(name, tmp_path):
    run(tmp_path)
    folder = tmp_path / "checkpoint-4"
    (folder / MANIFEST).unlink()
    (folder / name).write_text("[" * 200_000)
    with pytest.warns(UserWarning, match=re.escape(f"{folder / name} must be")):
        assert adaptlora.last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_any_bit_of_an_unsealed_optimizer_is_refused_or_harmless(tmp_path):
    """Damage that zipfile takes for encryption or another compression as well."""
    run(tmp_path)
    folder = tmp_path / "checkpoint-4"
    (folder / MANIFEST).unlink()
    file = folder / "optimizer.pt"
    whole = file.read_bytes()
    refused = 0
    for i in range(0, len(whole), len(whole) // 600):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        try:
            trainer_checkpoint.check(folder)
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 300

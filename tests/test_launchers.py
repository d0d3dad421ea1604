"""The scripts of docs/distributed.md, started by torchrun and by accelerate launch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_training import CONFIGS, batches, network, process
from processes import run
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TASK = """
import torch
import adaptlora
from models import tiny_bert
from training_loops import examples

torch.set_num_threads(1)
config = adaptlora.NormALConfig(r=4, target_r=2, t_p=3, t_c=4, eta_p=0.02, target_modules="all-linear")
dataset = examples(48)
make_model = tiny_bert


def loss_of(model, batch):
    return model(**batch).loss
"""


def _block(words: str) -> str:
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if words in block]
    return block


def _script(name: str, folder: Path) -> Path:
    block = _block(f"# {name}:")
    (folder / "task.py").write_text(TASK)
    (folder / name).write_text(block)
    return folder / name


def _launch(folder: Path, *command) -> None:
    path = os.pathsep.join([str(folder), str(ROOT / "tests"), str(ROOT)])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
def test_torchrun_stops_and_goes_on_with_other_processes(tmp_path):
    script = _script("train.py", tmp_path)
    _launch(tmp_path, "torch.distributed.run", "--standalone", "--nproc-per-node=2", script)
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-5", "checkpoint-6"]
    whole = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    ranks = {name: tensor.shape[0] for name, tensor in whole.items() if "lora_A" in name}
    assert sum(ranks.values()) == 2 * len(ranks) and set(ranks.values()) != {2}


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    script = _script("train_trainer.py", tmp_path)
    # On CPUs alone `accelerate launch` starts several processes only by mpirun, or told that they had GPUs.
    launcher = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
    ]
    _launch(
        tmp_path, *launcher, "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--main_process_port=0", script
    )
    found = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    beside = load_file(tmp_path / "out" / "checkpoint-6" / "adapter" / "adapter_model.safetensors")
    assert found.keys() == beside.keys() and all(torch.equal(found[name], beside[name]) for name in found)
    assert (tmp_path / "out" / "checkpoint-6" / "rng_state_1.pth").exists()


def _functions(folder):
    names: dict = {}
    for words in ("def shard(", "def save_and_load("):
        exec(_block(words), names)
    layers = [*network()]
    model = torch.nn.Sequential(torch.nn.Sequential(*layers[:3]), *layers[3:])
    adapter, optimizer = names["shard"](model, [model[0]], CONFIGS["normal"]())
    rank, size = process()
    for x, y in batches(6):
        loss = (model(x.chunk(size)[rank]) - y.chunk(size)[rank]).square().mean()
        (loss + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(loss)
    before = [factor.detach().clone() for factor in adapter.factors()]
    names["save_and_load"](folder, adapter, optimizer)
    return [torch.equal(one, other) for one, other in zip(before, adapter.factors(), strict=True)], adapter.ranks()


def test_functions_of_the_docs(tmp_path):
    for same, ranks in run(2, _functions, tmp_path, seconds=300):
        assert all(same) and sum(ranks.values()) == 9

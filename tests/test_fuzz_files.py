"""
Damaged adapter files, drawn from a seed: each is read as what it says, or refused by name; nothing hangs, nothing else escapes.

ADAPTLORA_FUZZ_CASES multiplies the number of cases.
"""

import json
import os
import random
import resource
import shutil
import signal

import pytest
import torch
from models import Net, randomise
from safetensors.torch import load_file, save_file

import adaptlora
from adaptlora import lora_files
from adaptlora.checksums import checksum

TIMES = int(os.environ.get("ADAPTLORA_FUZZ_CASES", "1"))
SECONDS = 5
MEMORY = 1 << 28  # bytes that a case may add to the peak of this process
REFUSALS = (ValueError, FileNotFoundError, OSError)
WORDS = [
    b"-1",
    b"0",
    b"9" * 19,
    b"1e400",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"1.5",
    b"[[[[",
    b"}",
    b'"F4"',
    b'"I8"',
]
VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**30,
    0.5,
    1e308,
    "",
    "(a+)+$",
    "[",
    "first",
    [],
    ["first"],
    [3],
    {},
    {"first": 3},
    {"x": []},
]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to three of: flipped bits, a cut, inserted bytes or words, slices swapped or repeated, an edited header."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else draw.randrange(min(len(data), 400) + 1)
        kind = draw.randrange(10)
        if kind >= 8:
            at = draw.randrange(len(data) + 1)  # mostly among the numbers
        if kind in (0, 8, 9) and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + draw.randbytes(draw.randint(1, 40)) + data[at:]
        elif kind == 3:
            data = data[:at] + draw.choice(WORDS) + data[at + draw.randint(0, 9) :]
        elif kind == 4:
            first, second = sorted((at, draw.randrange(len(data) + 1)))
            data = data[second:] + data[first:second] + data[:first] if first else data[second:] + data[:second]
        elif kind == 5:
            data = data[:at] + data[at : at + draw.randint(1, 200)] * 2 + data[at:]
        elif kind == 6:
            data = draw.choice([0, 1, len(data), 1 << 31, 1 << 63, (1 << 64) - 1]).to_bytes(8, "little") + data[8:]
        elif kind == 7:
            data = header_edited(data, draw)
    return data


def header_edited(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with one value of its header replaced, and the header's length made right again."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        entry = header[draw.choice(sorted(header))]
        field = draw.choice(sorted(entry))
        entry[field] = draw.choice(
            [[0, 0], [1 << 40, 1], [-1, 4], [0, 1 << 62], [3], [], "I32", "F4", "F8_E4M3", "X", None, 1 << 70]
        )
        text = json.dumps(header).encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        return data
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def edited(text: bytes, draw: random.Random) -> bytes:
    """JSON with one value, at any depth, replaced, removed or added; or its bytes mutated."""
    if draw.random() < 0.2:
        return mutated(text, draw)
    content = place = json.loads(text)
    while True:
        key = draw.choice(sorted(place))
        if not (isinstance(place[key], dict) and place[key]) or draw.random() < 0.3:
            break
        place = place[key]
    kind = draw.randrange(10)
    if kind == 0:
        del place[key]
    elif kind == 1:
        place[draw.choice(["layer_replication", "use_dora", "extra", "modules_to_save", "bias"])] = draw.choice(VALUES)
    else:
        place[key] = draw.choice(VALUES)
    return json.dumps(content).encode()


@pytest.fixture(autouse=True)
def alarm():
    def ring(*_):
        raise TimeoutError(f"a case took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def model_state(model) -> dict:
    kinds = {name: type(module) for name, module in model.named_modules()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return kinds | trains | {f"{name}.": checksum(tensor) for name, tensor in model.state_dict().items()}


def attempt(read, where):
    """What `read` gives, or None after a refusal that names the place; any other exception is the test's."""
    signal.alarm(SECONDS)
    try:
        return read()
    except REFUSALS as error:
        assert not isinstance(error, TimeoutError) and str(where) in str(error), repr(error)
        return None
    finally:
        signal.alarm(0)


def bounded_memory(cases):
    """`cases` one by one; the peak of this process must hardly grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield from cases
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def adapter_of(nested: bool, seed=0):
    fields = {"r": 3, "target_modules": ["first", "second"], "modules_to_save": ["classifier"]}
    config = (
        adaptlora.NoRAConfig(**fields, r_out=6)
        if nested
        else adaptlora.LoraConfig(**fields, rank_pattern={"second": 2})
    )
    adapter = adaptlora.attach(Net(), config)
    randomise(adapter, seed)
    return adapter


@pytest.mark.parametrize("nested", [False, True])
def test_folders(nested, tmp_path):
    source = tmp_path / "source"
    adapter_of(nested).save(source, format="nora" if nested else "peft")
    files = {file.name: file.read_bytes() for file in sorted(source.iterdir())}
    model, adapter = Net(), adapter_of(nested, seed=1)
    optimizer = torch.optim.AdamW(adapter.parameters())
    adapter.track(optimizer)
    before, adapted = model_state(model), model_state(adapter.model)
    loaded = 0
    for i in bounded_memory(range(500 * TIMES)):
        draw = random.Random(f"{nested} {i}")
        folder = tmp_path / f"case{i}"
        folder.mkdir()
        victim = draw.choice(sorted(files))
        for name, data in files.items():
            change = {True: edited, False: mutated}[name.endswith(".json")]
            (folder / name).write_bytes(change(data, draw) if name == victim else data)
        found = attempt(lambda: adaptlora.load(model, folder), folder)  # noqa: B023 - called in this turn of the loop
        if found is not None:
            loaded += 1
            assert all(torch.isfinite(factor).all() for factor in found.factors())
            found.detach()
        assert model_state(model) == before, i
        if attempt(lambda: adapter.load(folder) or True, folder):  # noqa: B023
            adapter.detach()
            adapter = adapter_of(nested, seed=1)
        assert model_state(adapter.model) == adapted, i
        shutil.rmtree(folder)
    assert 20 < loaded < 400 * TIMES


def single_file(kind: str, path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (down, up) in {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B")}.items():
        if name == kind:
            for block in ("a.x", "b.y"):
                stem = f"lora_unet_{block.replace('.', '_')}" if kind == "kohya" else f"unet.{block}"
                tensors[f"{stem}.{down}.weight"] = torch.randn(3, 5, generator=generator)
                tensors[f"{stem}.{up}.weight"] = torch.randn(7, 3, generator=generator)
                if kind == "kohya":
                    tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    config = {"unet.r": 3, "unet.lora_alpha": 6, "unet.rank_pattern": {"x": 3}, "unet.target_modules": ["x", "y"]}
    save_file(
        tensors,
        path,
        metadata={"lora_adapter_metadata": json.dumps(config)} if kind == "diffusers" else {"ss_network_dim": "3"},
    )


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_single_files(kind, tmp_path):
    source = tmp_path / "source.safetensors"
    single_file(kind, source)
    data, loaded = source.read_bytes(), 0
    for i in bounded_memory(range(200 * TIMES)):
        file = tmp_path / f"case{i}.safetensors"
        file.write_bytes(mutated(data, random.Random(f"{kind} {i}")))
        found = attempt(lambda: lora_files.read(file), file)  # noqa: B023 - called in this turn of the loop
        if found is not None:
            loaded += 1
            says = load_file(file)
            for name, module in found.modules.items():
                assert torch.equal(module.lora_B, says[found.keys[name]["lora_B"]].flatten(1))
                assert module.lora_A.isfinite().all() and module.lora_B.isfinite().all() and module.scaling > 0
            out = tmp_path / f"out{i}.safetensors"
            found.write(out, found.modules)
            again = lora_files.read(out)
            assert again.modules.keys() == found.modules.keys()
        file.unlink()
    assert 5 < loaded < 180 * TIMES

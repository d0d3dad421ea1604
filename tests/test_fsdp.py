"""FSDP2 shards the frozen base, and adapters train on it as on a whole one; gloo on the CPU, where it runs as on GPUs."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptlora
from tests.models import randomise
from tests.numerics import assert_accurate
from tests.processes import run

D, BATCH, STEPS = 12, 8, 5
ADAPTED = ["up", "down"]
METHODS = {
    "lora": adaptlora.LoraConfig(r=3, target_modules=ADAPTED, modules_to_save=["head"]),
    "normal": adaptlora.NormALConfig(r=4, target_r=2, target_modules=ADAPTED, t_p=2, t_c=3),
    "proximal": adaptlora.NormALConfig(
        r=4, target_r=2, target_modules=ADAPTED, t_p=2, t_c=3, penalty_step="proximal", eta_p=1.0
    ),
    "adaptive": adaptlora.NormALConfig(
        r=4, target_r=2, target_modules=ADAPTED, schedule="adaptive", min_steps=2, lambda_p=10.0, lambda_c=10.0
    ),
    "lalora": adaptlora.LaLoRAConfig(r=4, target_modules=ADAPTED, gamma=2.0, temperature=0.5, group_by="module"),
    "adalora": adaptlora.AdaLoRAConfig(
        init_r=4, target_r=2, target_modules=ADAPTED, total_step=STEPS, tinit=1, tfinal=1, removal="update"
    ),
    "nora": adaptlora.NoRAConfig(r=3, r_out=8, target_modules=ADAPTED),
}


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up = nn.Linear(D, 2 * D, dtype=dtype)
        self.down = nn.Linear(2 * D, D, bias=False, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head; with `checkpointed`, blocks are computed again in the backward pass."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(2))
        self.head = nn.Linear(D, 3, dtype=dtype)
        self.checkpointed = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def adapted(method: str, dtype=torch.float64):
    """(model, adapter) whose factors all have values, the same on every process."""
    model = Model(dtype)
    adapter = adaptlora.attach(model, METHODS[method])
    randomise(adapter)
    return model, adapter


def shard(model: Model, ignored=None, *, mesh=None, **options) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,)) if mesh is None else mesh
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=ignored, **options)


def data(step: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (BATCH,), generator=generator)


def gradients(model, adapter) -> dict[str, torch.Tensor]:
    """Of one backward pass over all of a batch; also the outputs."""
    x, labels = data(0, next(model.parameters()).dtype)
    model.zero_grad()
    y = model(x)
    nn.functional.cross_entropy(y, labels).backward()
    factors = {
        f"{name}.{f}": getattr(layer, f).grad for name, layer in adapter.layers.items() for f in ("lora_A", "lora_B")
    }
    return {"y": y.detach(), **{name: grad.clone() for name, grad in factors.items()}}


# The layers over a base that is put together for each pass


def _gradients_of_shards(method: str, dtype: torch.dtype) -> dict[str, dict]:
    """{how it is sharded: what `gradients` returns}"""
    from torch.distributed.fsdp import CPUOffloadPolicy

    cases = {
        "default": {},
        "resharded": {"reshard_after_forward": True},
        "kept": {"reshard_after_forward": False},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "checkpointed": {},
    }
    found = {}
    for case, options in cases.items():
        model, adapter = adapted(method, dtype)
        shard(model, set(adapter.parameters()), **options)
        model.checkpointed = case == "checkpointed"
        weight = model.blocks[0].up.base_layer.weight
        assert weight.to_local().numel() == weight.numel() // 2
        used, bytes_later = [], []
        model.blocks[0].up.register_forward_pre_hook(lambda layer, _, used=used: used.append(layer.weight))
        model.blocks[1].register_forward_pre_hook(
            lambda *_, used=used, later=bytes_later: later.append(used[0].untyped_storage().nbytes())
        )
        found[case] = gradients(model, adapter)
        assert (bytes_later[0] > 0) == (case == "kept"), "FSDP must have freed the weight that the layer saved"
        found[f"{case} again"] = gradients(model, adapter)
    return found


def _mixed_precision(method: str) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, adapter = adapted(method, torch.float32)
    shard(model, set(adapter.factors()), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return gradients(model, adapter)


def _layers() -> dict:
    torch.use_deterministic_algorithms(True)  # memory is NaN until it is written
    found = {
        (method, dtype): _gradients_of_shards(method, dtype)
        for method in ("lora", "nora")
        for dtype in (torch.float64, torch.float32)
    }
    return found | {(method, torch.bfloat16): _mixed_precision(method) for method in ("lora", "nora")}


@pytest.fixture(scope="module")
def layers():
    return run(2, _layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["lora", "nora"])
def test_gradients_over_shards_are_those_over_a_whole_base(layers, method, dtype):
    whole = gradients(*adapted(method, dtype))
    for of_process in layers:
        for case, found in of_process[method, dtype].items():
            for name, expected in whole.items():
                torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-10, msg=f"{case}: {name}")


@pytest.mark.parametrize("method", ["lora", "nora"])
def test_a_half_precision_base_is_no_worse_for_being_sharded(layers, method):
    exact = gradients(*adapted(method))
    model, adapter = adapted(method, torch.float32)
    for layer in adapter.layers.values():
        layer.base_layer.bfloat16()
    model.head.bfloat16()
    model.register_forward_pre_hook(lambda _, arguments: (arguments[0].bfloat16(),))
    whole = gradients(model, adapter)
    for of_process in layers:
        for name, found in of_process[method, torch.bfloat16].items():
            assert_accurate(name, found, exact[name], whole[name], precision=torch.bfloat16)


# Training with others


def train(method: str, *, shared=False, accumulated=False, checkpointed=False, saved=False, mesh=None):
    """
    ({name: parameter that trains}, ranks after each step) of training on all of each batch, or on this process's share of it.

    accumulated: in two micro-batches, of which the first is not synchronised.   saved: FSDP has the head, which is trained whole.
    """
    model = Model()
    adapter = adaptlora.attach(model, METHODS[method])
    if shared:
        shard(model, set(adapter.factors() if saved else adapter.parameters()), mesh=mesh)
        adapter.distribute(model)
    model.checkpointed = checkpointed
    processes = adapter.processes
    whole = [p for module in adapter.saved.values() for p in module.parameters()]
    # A foreach optimizer takes no DTensors and plain tensors in one group.
    groups = [{"params": parameters} for parameters in (adapter.factors(), whole) if parameters]
    optimizer = torch.optim.AdamW(groups, lr=3e-2)
    adapter.track(optimizer)
    ranks = []
    for step in range(STEPS):
        x, labels = (tensor[processes.rank :: processes.size] for tensor in data(step))
        losses = []
        for part, of_part in [(x, labels)] if not accumulated else zip(x.chunk(2), labels.chunk(2), strict=True):
            last = not accumulated or len(losses) == 1
            if shared:
                model.set_requires_gradient_sync(last)
            losses.append(nn.functional.cross_entropy(model(part), of_part) / (1 + accumulated))
            (losses[-1] + adapter.penalty() if last else losses[-1]).backward()
            sums = processes.gather(sum(p.grad.sum().item() for p in adapter.factors()))
            assert not shared or (len(set(sums)) == 1) == last, (
                f"gradients must be averaged when asked for, got sums {sums}"
            )
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(sum(losses).detach())
        ranks.append(adapter.ranks())
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in trained.items()}, ranks


CASES = {(method, "plain"): {} for method in ("lora", "normal", "lalora")}
CASES |= {(method, "accumulated"): {"accumulated": True, "checkpointed": True} for method in METHODS}
CASES["lora", "saved"] = {"saved": True}
CASES["lora", "saved, accumulated"] = {"saved": True, "accumulated": True}


def _training() -> dict:
    return {(method, case): train(method, shared=True, **options) for (method, case), options in CASES.items()}


@pytest.fixture(scope="module")
def training():
    return run(2, _training)


@pytest.fixture(scope="module")
def alone():
    return {method: train(method) for method in METHODS}


def assert_same_training(found, expected) -> None:
    for (trained, ranks), (trained_alone, ranks_alone) in zip(found, [expected] * len(found), strict=True):
        assert ranks == ranks_alone
        assert trained.keys() == trained_alone.keys()
        for name, p in trained_alone.items():
            torch.testing.assert_close(
                trained[name], p, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize(("method", "case"), CASES)
def test_processes_train_as_one_does(training, alone, method, case):
    assert_same_training([of_process[method, case] for of_process in training], alone[method])


def test_ranks_change_where_they_are_meant_to(alone):
    changes = {method: sum(a != b for a, b in itertools.pairwise(ranks)) for method, (_, ranks) in alone.items()}
    assert changes.pop("lalora") > 1 and changes.pop("adalora") > 1
    assert changes == {"lora": 0, "normal": 1, "proximal": 1, "adaptive": 1, "nora": 0}


def _replicated_shards() -> dict:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return {
        method: train(method, shared=True, saved=True, accumulated=True, mesh=mesh) for method in ("lora", "lalora")
    }


def test_shards_that_are_replicated_train_as_one_process_does(alone):
    found = run(4, _replicated_shards)
    for method in found[0]:
        assert_same_training([of_process[method] for of_process in found], alone[method])


def _parts_that_differ() -> list:
    """Gradients where one process leaves a layer's factors out, while FSDP reduces the head's."""
    model = Model()
    adapter = adaptlora.attach(model, METHODS["lora"])
    shard(model, set(adapter.factors()))
    adapter.distribute(model)
    rank = adapter.processes.rank
    if rank:
        layer = adapter.layers["blocks.0.up"]
        layer.forward = layer.base_layer.forward
    x, labels = (tensor[rank::2] for tensor in data(0))
    nn.functional.cross_entropy(model(x), labels).backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in adapter.parameters()]


def test_factors_may_take_part_on_some_processes_only():
    model = Model()
    adapter = adaptlora.attach(model, METHODS["lora"])
    x, labels = data(0)
    nn.functional.cross_entropy(model(x), labels).backward()
    expected = [p.grad for p in adapter.parameters()]  # B = 0: the outputs are the base's on both
    model.zero_grad()
    nn.functional.cross_entropy(model(x[::2]), labels[::2]).backward()
    of_first = [p.grad / 2 for p in adapter.parameters()]
    for found in run(2, _parts_that_differ):
        for i, (grad, whole) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(grad, whole if i > 1 else of_first[i], rtol=0, atol=1e-10)


# accelerate


def _accelerator(**options):
    """accelerate keeps FSDP for GPUs, and gives several processes on CPUs DDP in its place; told otherwise it does the same on both."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        **options,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert not accelerator.is_fsdp2
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    return accelerator


def _accelerated(method: str, **options):
    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor

    from adaptlora.distributed.fsdp import leave_out

    AcceleratorState._reset_state()
    accelerator = _accelerator(**options)
    model = Model()
    adapter = adaptlora.attach(model, METHODS[method])
    leave_out(accelerator.state.fsdp_plugin, adapter, accelerator.device)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    adapter.distribute(model)
    adapter.track(optimizer)
    assert all(isinstance(layer.weight, DTensor) for layer in adapter.layers.values())
    ranks = []
    for step in range(STEPS):
        x, labels = (tensor[accelerator.process_index :: 2].chunk(2) for tensor in data(step))
        with accelerator.no_sync(model):
            accelerator.backward(nn.functional.cross_entropy(model(x[0]), labels[0]) / 2)
        accelerator.backward(nn.functional.cross_entropy(model(x[1]), labels[1]) / 2 + adapter.penalty())
        accelerator.clip_grad_norm_(model.parameters(), 1e3)
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        ranks.append(adapter.ranks())
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace("._checkpoint_wrapped_module", ""): p for name, p in trained.items()}, ranks


IGNORED = {"lora": {"ignored_modules": r".*\.pair|head", "activation_checkpointing": True}, "normal": {}}


def _all_accelerated() -> dict:
    return {method: _accelerated(method, **options) for method, options in IGNORED.items()}


def test_accelerate_leaves_out_what_trains(alone):
    pytest.importorskip("accelerate")
    found = run(2, _all_accelerated)
    for method in IGNORED:
        assert_same_training([of_process[method] for of_process in found], alone[method])


def test_accelerate_must_not_load_in_its_own_way():
    from adaptlora.distributed.fsdp import leave_out

    plugin = SimpleNamespace(cpu_ram_efficient_loading=True, ignored_modules=None)
    with pytest.raises(ValueError, match="^FSDP: cpu_ram_efficient_loading must be False, got True"):
        leave_out(plugin, adapted("lora")[1], torch.device("cpu"))
    assert plugin.ignored_modules is None


# What works on a sharded base, and what says that it does not


def _message(call, *arguments) -> str:
    with pytest.raises(ValueError) as raised:
        call(*arguments)
    return str(raised.value)


def _uses(folder) -> dict:
    found = {}
    for method in ("lora", "nora"):
        model, adapter = adapted(method)
        shard(model, set(adapter.parameters()))
        x, labels = data(0)
        optimizer = torch.optim.AdamW(adapter.parameters())
        adapter.track(optimizer)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        adapter.save(folder / f"{method}{torch.distributed.get_rank()}", **FORMATS[method])
        model(x)  # the root's parameters are whole now
        base = adapter.base_state_dict()
        adapter.load_state_dict(adapter.state_dict())
        base = {
            name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in base.items()
        }
        found[method] = {"summary": adapter.summary(), "base": base, "y": model(x).detach()}
    model = Model()
    shard(model)
    adapter = adaptlora.attach(model, METHODS["normal"])
    randomise(adapter)
    return found | {"attached": gradients(model, adapter), "detached": adapter.detach()(x).detach()}


FORMATS = {"lora": {}, "nora": {"format": "nora"}}


def test_adapters_on_a_sharded_base_are_used_as_others_are(tmp_path):
    for rank, found in enumerate(run(2, _uses, tmp_path)):
        for method in FORMATS:
            model, adapter = adapted(method)
            optimizer = torch.optim.AdamW(adapter.parameters())
            adapter.track(optimizer)
            x, labels = data(0)
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
            assert found[method]["summary"] == adapter.summary()
            torch.testing.assert_close(found[method]["base"], adapter.base_state_dict(), rtol=0, atol=1e-10)
            torch.testing.assert_close(found[method]["y"], model(x), rtol=0, atol=1e-10)
            loaded = Model()
            adaptlora.load(loaded, tmp_path / f"{method}{rank}")
            torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-6)
        whole = gradients(*adapted("normal"))
        torch.testing.assert_close(found["attached"], whole, rtol=0, atol=1e-10)
        torch.testing.assert_close(found["detached"], Model()(x), rtol=0, atol=1e-10)


def _refusals() -> dict[str, str]:
    said = {}
    for kept in (False, True):  # parameters that are in parts, or whole for now
        for method in ("lora", "nora"):
            model, adapter = adapted(method)
            shard(model, set(adapter.parameters()), reshard_after_forward=not kept)
            x, _ = data(0)
            y = model(x).detach()
            said[f"merge {method} {kept}"] = _message(adapter.merge)
            if method == "nora":
                said[f"detach {kept}"] = _message(adapter.detach)
                layer = adapter.layers["blocks.0.up"]
                other = layer.outer._replace(S=layer.outer.S * 2)
                said[f"take_outer {kept}"] = _message(layer.take_outer, other)
                state = adapter.state_dict()
                state["outer"]["blocks.1.down"] |= {"S": adapter.layers["blocks.1.down"].outer.S * 2}
                said[f"load_state_dict {kept}"] = _message(adapter.load_state_dict, state)
            model.set_reshard_after_forward(True)
            assert torch.equal(model(x), y) and torch.equal(model(x), y), "nothing must have changed"
    model = Model()
    shard(model)
    said["attach nora"] = _message(adaptlora.attach, model, METHODS["nora"])
    model = Model()
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=1, target_modules=ADAPTED))
    shard(model)  # a factor of one rank is contiguous either way: FSDP takes it
    said["distribute"] = _message(adapter.distribute, model)
    model, adapter = adapted("lora")
    shard(model, set(adapter.factors()))
    said["save"] = _message(adapter.save, "nowhere")
    assert adapter.processes.size == 1
    return said


def test_what_a_sharded_base_cannot_do_is_an_error_that_changes_nothing():
    expected = {
        "merge": "merge: base_layer must not be sharded, got one of FSDP",
        "save": "save: modules_to_save must be whole in every process, and FSDP shards head",
        "detach": "NoRALinear: base_layer must not be sharded while W − ΔW_0 is its weight",
        "take_outer": "NoRALinear: base_layer must not be sharded while W − ΔW_0 is its weight",
        "load_state_dict": "load_state_dict: blocks.1.down: NoRALinear: base_layer must not be sharded",
        "attach": "dequantised_weight: module must not be sharded",
        "distribute": "distribute: the adapter's factors must not be sharded, got a DTensor for blocks.0.up.pair.lora_A",
    }
    for said in run(2, _refusals):
        for what, message in said.items():
            assert message.startswith(expected[what.split()[0]]), what

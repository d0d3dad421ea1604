"""torch.set_default_dtype and torch.set_default_device around everything: the same bits as without."""

import contextlib
import copy

import pytest
import torch
from models import Net, batch

import adaptlora

DTYPES = [torch.float64, torch.bfloat16, torch.float16]
SHARED = {"lora_alpha": 8, "target_modules": ["first", "second"]}
METHODS = {
    "NormAL": adaptlora.NormALConfig(r=6, target_r=3, t_p=2, t_c=4, lora_dropout=0.2, **SHARED),
    "proximal": adaptlora.NormALConfig(r=6, target_r=3, t_p=2, t_c=4, penalty_step="proximal", **SHARED),
    "La-LoRA": adaptlora.LaLoRAConfig(r=6, gamma=4.0, temperature=0.2, group_by="module", **SHARED),
    "fisher": adaptlora.LaLoRAConfig(r=6, gamma=4.0, contribution="fisher", **SHARED),
    "NoRA": adaptlora.NoRAConfig(r=3, r_out=6, modules_to_save=["classifier"], **SHARED),
    "kaiming": adaptlora.NoRAConfig(r=3, r_out=6, inner_init="kaiming", **SHARED),
    "orthogonal": adaptlora.NoRAConfig(r=3, r_out=6, inner_init="orthogonal", **SHARED),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def life(config, folder, model, x, labels, *, making=contextlib.nullcontext, using=contextlib.nullcontext) -> dict:
    """
    Attached, loaded and sheared (in the context `making`: rows are drawn there), trained through its rank changes, saved and merged
    (in `using`): everything there is to see.
    """
    found = {}
    fresh = copy.deepcopy(model)
    with making():
        adapter = adaptlora.attach(model, config)
    found["attached"] = [factor.detach().clone() for factor in adapter.factors()]
    with using():
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        adapter.track(optimizer)
        torch.manual_seed(2)
        for step in range(6):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            (loss + adapter.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            adapter.step(loss)
            found[f"loss {step}"] = loss.detach()
            found[f"ranks {step}"] = adapter.ranks()
        model.eval()
        found["trained"] = [factor.detach().clone() for factor in adapter.factors()]
        found["logged"] = adaptlora.log_values(adapter)
        adapter.load_state_dict(copy.deepcopy(adapter.state_dict()))
        found["again"] = model(x)
        adapter.save(folder)
    with making():
        loaded = adaptlora.load(fresh, folder)
        if not adapter.method.nested:
            adaptlora.shear(adapter, adaptlora.NoRMConfig())
            found["sheared ranks"], found["sheared"] = adapter.ranks(), model(x)
    found["loaded"] = loaded.model.eval()(x)
    with using():
        found["merged"] = adapter.merge()(x)
    return found


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name] == value, name
        else:
            torch.testing.assert_close(
                found[name], value, atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_default_dtype_changes_nothing(config, dtype, tmp_path):
    expected = life(config, tmp_path / "expected", Net(), *batch())

    def context():
        return default_dtype(dtype)

    assert_same(life(config, tmp_path / "found", Net(), *batch(), making=context, using=context), expected)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_a_default_device_changes_nothing(config, tmp_path):
    """As where a user has set "cuda" and the model is elsewhere; "meta" is the device that shows every tensor made on it."""
    expected = life(config, tmp_path / "expected", Net(), *batch())

    def context():
        return default_device("meta")

    found = life(config, tmp_path / "found", Net(), *batch(), making=context, using=context)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_a_model_of_the_default_dtype(dtype, config):
    """Factors are float64 for a float64 base, else float32, and trained through whatever the method does."""
    with default_dtype(dtype):
        model = Net(dtype=dtype)
        adapter = adaptlora.attach(model, config)
        # AdamW's own 1e-8 is 0 in float16, which modules_to_save are in.
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, eps=1e-4)
        adapter.track(optimizer)
        x, labels = batch(dtype=dtype)
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(model(x).float(), labels)
            (loss + adapter.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            adapter.step(loss)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {factor.dtype for factor in adapter.factors()} == {wanted}
    assert all(factor.isfinite().all() for factor in adapter.factors())

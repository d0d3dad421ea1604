"""A training step of AdaLoRA, init_r = 12 and target_r = 4, at three places of its schedule; what it holds there; float32, AdamW.

MiniLM: 8 texts of 64 tokens, 36 modules. Pruning begins after step 40 and ends with step 120, a choice every 10 steps: the average
rank is 12 before it, 6.0 after step 70, 5.0 after 80, 4.1 after 100 and 4 from 120 on. PEFT masks what goes; `removal="final"` does so
until the last choice, which removes; with "update" every choice removes.

FLOPs of the factors: 6·M·R·Σ (K + N), M = 512, 1.5 G at R = 12 and 0.5 G at R = 4 beside the 21.7 G of the base products. PEFT makes
B diag(E) A x in three products, and reads every parameter's gradient for its importance in a Python loop until the last choice. Numbers
that train: R·Σ (K + N + 1), 498 k at R = 12, 2.0 MB; as much for their gradients and twice as much for AdamW's moments; until the last
choice twice as much for the importance, in PEFT three times. The penalty ‖P Pᵀ − I‖ reads the factors once more.
"""

import peft
import pytest
import torch
from providers import load

import adaptlora
from adaptlora.benchmarks.harness import peak_bytes
from adaptlora.benchmarks.models import ALPHA, LINEARS, AdaLora, Ours, batch_for, frozen_step, shared_copy

INIT_R, TARGET_R = 12, 4
SCHEDULE = {"tinit": 40, "tfinal": 80, "total_step": 200, "deltaT": 10}
# {place: steps made before the timed ones}
PLACES = {"before pruning": 2, "in the middle": 75, "after the last choice": 120}
ROUNDS = 30
FLOOR_NAME = "PEFT AdaLoRA"
MIB = 2**20


class PeftAda(AdaLora):
    def layers(self) -> dict:
        """{module name in the bare model: PEFT's layer}"""
        return {name: module for name, module in self.model.model.named_modules() if hasattr(module, "ranknum")}

    def rows(self) -> dict[str, list[torch.nn.Parameter]]:
        return {
            name: [getattr(m, f)["default"] for f in ("lora_A", "lora_B", "lora_E")]
            for name, m in self.layers().items()
        }

    def ranks(self) -> dict[str, int]:
        """Of the last choice; those of the parameters stay."""
        pattern = self.model.peft_config["default"].rank_pattern
        return {name: sum(pattern[f"{name}.lora_E.default"]) for name in self.layers()}

    def importance(self) -> list[torch.Tensor]:
        allocator = self.model.rankallocator
        return [t for kept in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc) for t in kept.values()]


class OursAda(Ours):
    def rows(self):
        layers = self.adapter.layers.items()
        return {name: [getattr(layer.pair, factor) for factor in layer.pair.factor_names] for name, layer in layers}

    def ranks(self):
        return self.adapter.ranks()

    def importance(self):
        return [t for layer in self.adapter.layers.values() for t in layer.pair.statistics().values()]


def peft_config(**schedule):
    return peft.AdaLoraConfig(
        init_r=INIT_R, target_r=TARGET_R, lora_alpha=ALPHA, target_modules=LINEARS["minilm"], **SCHEDULE | schedule
    )


def our_config(removal: str, **schedule):
    return adaptlora.AdaLoRAConfig(
        init_r=INIT_R, target_r=TARGET_R, lora_alpha=ALPHA, target_modules=LINEARS["minilm"], removal=removal,
        **SCHEDULE | schedule,
    )  # fmt: skip


def made(model, **schedule) -> dict:
    """All providers, over the weights of one model and with the same factors."""
    trained = {
        FLOOR_NAME: PeftAda(shared_copy(model), peft_config(**schedule)),
        **{
            f"adaptlora AdaLoRA, removal {removal}": OursAda(shared_copy(model), our_config(removal, **schedule))
            for removal in ("final", "update")
        },
    }
    first = {name: [p.detach().clone() for p in rows] for name, rows in trained[FLOOR_NAME].rows().items()}
    generator = torch.Generator().manual_seed(0)
    for _, (_, _, E) in sorted(first.items()):
        E.copy_(torch.randn(E.shape, generator=generator) / 8)
    for each in trained.values():
        for name, rows in each.rows().items():
            for parameter, values in zip(rows, first[name], strict=True):
                parameter.data.copy_(values)
    return trained


def assert_same_choice(model, batch) -> None:
    """From the same factors, through the same short schedule of SGD and without dropout, PEFT's ranks and loss are those of "final"."""
    schedule = {"tinit": 2, "tfinal": 2, "total_step": 8, "deltaT": 1}
    theirs, ours, _ = made(model, **schedule).values()
    for trained in (theirs, ours):
        trained.model.eval()
        trained.optimizer = torch.optim.SGD([p for rows in trained.rows().values() for p in rows], lr=0.1)
    ours.adapter.track(ours.optimizer)
    for _ in range(schedule["total_step"] - schedule["tfinal"]):
        theirs.step(batch)
        ours.step(batch)
    assert ours.ranks() == theirs.ranks()
    assert sum(ours.ranks().values()) == TARGET_R * len(ours.ranks()) and len(set(ours.ranks().values())) > 1
    with torch.no_grad():
        # PEFT's loss has its penalty in it, of vectors that are masked, too.
        torch.testing.assert_close(ours.model(**batch).logits, theirs.model(**batch).logits, rtol=1e-4, atol=1e-4)


def stored(tensors) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def held(trained, batch) -> dict[str, int]:
    """Bytes of parameters, gradients, AdamW's state and importance of the factors, once a step has made them."""
    factors = [p for rows in trained.rows().values() for p in rows]
    loss = trained.model(**batch).loss + trained.penalty()
    loss.backward()
    sizes = {
        "parameters": stored(factors),
        "gradients": stored(p.grad for p in factors),
        "optimizer": stored(t for p in factors for t in trained.optimizer.state[p].values() if t.dim()),
        "importance": stored(trained.importance()),
    }
    trained.optimizer.zero_grad()
    return sizes


def assert_falls(place: str, name: str, trained, first: dict, now: dict) -> None:
    """Ours hold what the ranks say and no more; PEFT's parameters, gradients and moments stay what they were."""
    ours = name != FLOOR_NAME
    pruned = ours and (place == "after the last choice" or (place == "in the middle" and "update" in name))
    numbers = sum(p.numel() for rows in trained.rows().values() for p in rows)
    for what, copies in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        ratio = now[what] / first[what]
        assert ratio < 0.6 if pruned else ratio == 1, f"{place}: {what} of {name} are {ratio:.3f} of what they were"
        assert not ours or now[what] == 4 * copies * numbers, f"{place}: {what} of {name} are more than its ranks say"


@pytest.mark.parametrize("place", PLACES)
def test_step(compare, quick, place):
    model = load("minilm")
    texts, tokens = (2, 16) if quick else (8, 64)
    batch = batch_for("minilm", texts, tokens)
    assert_same_choice(model, batch)
    trained = made(model)
    first = {}
    for name, each in trained.items():
        each.step(batch)
        first[name] = held(each, batch)
        for _ in range(PLACES[place] - 1):
            each.step(batch)
    now = {name: held(each, batch) for name, each in trained.items()}
    for name, each in trained.items():
        assert_falls(place, name, each, first[name], now[name])
    facts = {
        "texts": texts,
        "tokens": tokens,
        "modules": len(trained[FLOOR_NAME].rows()),
        "bytes": now,
        "peak MiB": {name: round(peak_bytes(lambda t=t: t.step(batch)) / MIB, 1) for name, t in trained.items()},
    }
    providers = {
        "frozen, forward and dx": frozen_step(model, batch),
        **{name: lambda t=t: t.step(batch) for name, t in trained.items()},
    }
    compare(place, providers, floor=FLOOR_NAME, rounds=ROUNDS, facts=facts)

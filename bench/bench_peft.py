"""PEFT's own model on these kernels, beside PEFT as it is and beside an Adapter: a training step, AdamW, float32, r = 8.

MiniLM: 8 texts of 64 tokens, 36 modules. SmolLM2-135M: 4 texts of 64 tokens, 210 modules. The FLOPs and bytes are those of bench_step.py.
`accelerate` leaves PEFT's modules, parameters (lora_B (N, R) contiguous) and optimizer where they are and replaces the layer's forward:
predicted, a step as fast as an Adapter's without groups, less what PEFT's own modules cost to look up. Projections that share their
input (MiniLM's query, key and value, SmolLM2's q, k, v and gate, up) run as groups in an Adapter: predicted 3 % of a step of MiniLM, as
bench_lora_linear.py's group saves a tenth of a layer's own part.
"""

import pytest
import torch
from providers import load

import adaptlora
from adaptlora.benchmarks.models import TARGET, Ours, Peft, R, batch_for, fill, lora, plain, shared_copy
from adaptlora.benchmarks.step import assert_same_training, training_case


class Accelerated(Peft):
    def __init__(self, model, config):
        super().__init__(model, config)
        self.found = adaptlora.accelerate(self.model)
        assert not self.found.kept


@pytest.mark.parametrize(("name", "dropouts", "rounds"), [("minilm", (0.0, 0.1), 15), ("smollm2", (0.05,), 9)])
def test_step(measure, quick, name, dropouts, rounds):
    if quick and name != "minilm":
        pytest.skip("--quick runs MiniLM alone")
    model = load(name)
    texts, tokens = (2, 16) if quick else {"minilm": (8, 64), "smollm2": (4, 64)}[name]
    batch = batch_for(name, texts, tokens)
    trained = {}
    for p in dropouts:
        trained |= {
            f"PEFT LoRA, dropout {p}": Peft(shared_copy(model), lora(p, name)),
            f"PEFT LoRA accelerated, dropout {p}": Accelerated(shared_copy(model), lora(p, name)),
            f"adaptlora LoRA, layer by layer, dropout {p}": Ours(
                shared_copy(model), plain(p, name), group_projections=False
            ),
            f"adaptlora LoRA, grouped, dropout {p}": Ours(shared_copy(model), plain(p, name), group_projections=True),
        }
    for each in trained.values():
        fill(each)
    assert_same_training(trained, batch, model.config.num_hidden_layers)
    facts = {"modules": len(next(iter(trained.values())).factors()), "r": R}
    measure(training_case(name, model, name, batch, trained, rounds=rounds, facts=facts))


def test_pruned(measure, quick):
    """PEFT's model before and after `prune` to an average rank of 4: optimizer included, PEFT's own layers and accelerated."""
    model = load("minilm")
    batch = batch_for("minilm", *((2, 16) if quick else (8, 64)))
    trained = {}
    for title, kind in (("PEFT LoRA", Peft), ("PEFT LoRA accelerated", Accelerated)):
        for pruned in (False, True):
            each = kind(shared_copy(model), lora(0.1))
            fill(each)
            each.step(batch)
            if pruned:
                adaptlora.prune(each.model, target_r=TARGET, optimizer=each.optimizer)
            trained[f"{title}{', pruned' if pruned else ''}"] = each
    held = {
        name: sum(t.nbytes for state in each.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        for name, each in trained.items()
    }
    title = f"MiniLM, dropout 0.1, r = {R} → {TARGET} on average"
    measure(training_case(title, model, "minilm", batch, trained, rounds=15, facts={"optimizer bytes": held}))

"""AdaLoRA against PEFT's own: the layer, the penalty, the scores, the choices; and what removal does that masks do not."""

import itertools
import types

import pytest
import torch
from models import Net, batch
from torch import nn

import adaptlora
from adaptlora.methods.adalora import budget_at, lowest, triplet_scores

INIT_R, TOTAL = 6, 22
FIELDS = {"init_r": INIT_R, "target_r": 2, "lora_alpha": 9, "total_step": TOTAL, "target_modules": ["first", "second"]}


class WithLoss(Net):
    def forward(self, x, labels):
        logits = super().forward(x)
        return types.SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def make(model=None, **fields):
    config = adaptlora.AdaLoRAConfig(**FIELDS | fields)
    return adaptlora.attach(WithLoss(torch.float64) if model is None else model, config)


# An eps above the rounding of gradients that are zero but for it: Adam divides by their size.
ADAMW = {"lr": 0.02, "eps": 1e-3}


def optimizer_of(adapter, cls=torch.optim.AdamW, **options):
    optimizer = cls(adapter.parameters(), **options or ADAMW)
    adapter.track(optimizer)
    return optimizer


def train_step(adapter, optimizer, seed):
    loss = adapter.model(*batch(dtype=torch.float64, seed=seed)).loss
    (loss + adapter.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return adapter.step(loss)


class Peft:
    """PEFT's AdaLoRA on the same model, with the weights of `adapter`."""

    def __init__(self, adapter, **fields):
        import peft

        config = peft.AdaLoraConfig(**FIELDS | fields)
        self.model = peft.get_peft_model(WithLoss(torch.float64), config).double()
        self.tuner = self.model.base_model
        self.allocator = self.tuner.rankallocator
        self.layers = {name: self.tuner.model.get_submodule(name) for name in adapter.layers}
        with torch.no_grad():
            for name, layer in adapter.layers.items():
                for factor, values in layer.pair.factors().items():
                    self.factor(name, factor).copy_(values)

    def factor(self, name, factor):
        return getattr(self.layers[name], factor)["default"]

    def parameters(self):
        # PEFT lets optimizers train the rank that it divides by, too.
        return [p for name, p in self.model.named_parameters() if p.requires_grad and "ranknum" not in name]

    def train_step(self, optimizer, seed, t):
        self.tuner(*batch(dtype=torch.float64, seed=seed)).loss.backward()
        optimizer.step()
        self.tuner.update_and_allocate(t)
        optimizer.zero_grad()

    def scores(self, name):
        """As `mask_to_budget` makes them, from the allocator's own sensitivities."""
        score = {f: self.allocator._element_score(f"{name}.{f}.default") for f in ("lora_A", "lora_B", "lora_E")}
        vectors = torch.stack([score["lora_A"].mean(1), score["lora_B"].mean(0)], dim=1)
        return self.allocator._combine_ipt(score["lora_E"], vectors)


def close(mine, theirs, tolerance=1e-10):
    assert mine.shape == theirs.shape and (mine - theirs).norm() <= tolerance * theirs.norm()


# The same run


def test_scaling_output_and_penalty_are_peft_s():
    adapter = make(target_modules=["first"], alpha_pattern={"first": 5.0})
    with torch.no_grad():
        adapter.layers["first"].lora_E.normal_(generator=torch.Generator().manual_seed(0))
    assert adapter.layers["first"].scaling == 5.0 / (INIT_R + 1e-5)
    theirs = Peft(adapter, lora_alpha=5, target_modules=["first"], orth_reg_weight=0.3)
    x, labels = batch(dtype=torch.float64)
    adapter.config.orth_reg_weight = 0.3
    found = theirs.tuner(x, labels)
    close(adapter.model(x, labels).logits, found.logits, 1e-14)
    close(adapter.model(x, labels).loss + adapter.penalty(), found.loss, 1e-14)


@pytest.mark.parametrize(
    ("tinit", "tfinal", "deltaT", "optimizer"),
    [(4, 5, 1, torch.optim.AdamW), (3, 4, 3, torch.optim.SGD), (0, 0, 2, torch.optim.AdamW)],
)
def test_scores_masks_and_final_ranks_are_peft_s(tinit, tfinal, deltaT, optimizer):
    fields = {"tinit": tinit, "tfinal": tfinal, "deltaT": deltaT, "beta1": 0.7, "beta2": 0.9}
    adapter = make(**fields)
    theirs = Peft(adapter, **fields)
    options = {"lr": 0.3} if optimizer is torch.optim.SGD else ADAMW
    mine, other = optimizer_of(adapter, optimizer, **options), optimizer(theirs.parameters(), **options)
    last, came_back = TOTAL - tfinal, 0
    masked = {name: torch.zeros(INIT_R, dtype=torch.bool) for name in adapter.layers}
    for t in range(1, last):
        assert adapter.method.may_change() is (t > tinit and t % deltaT == 0)  # chooses
        assert train_step(adapter, mine, seed=t) is None
        theirs.train_step(other, t, t)
        for name, layer in adapter.layers.items():
            for factor, values in layer.pair.factors().items():
                close(values, theirs.factor(name, factor).detach(), 1e-12)
            close(triplet_scores(layer.pair), theirs.scores(name), 1e-12)
            zeros = layer.lora_E.detach().squeeze(1) == 0
            assert torch.equal(zeros, theirs.factor(name, "lora_E").detach().squeeze(1) == 0)
            if t > tinit and t % deltaT == 0:
                came_back += (masked[name] & ~zeros).sum().item()
                masked[name] = zeros
    assert adapter.method.phase == "pruning"
    assert came_back or deltaT > 1  # some that were masked were not at the next choice

    assert adapter.method.may_change() and not adapter.method.writes_before_change()
    change = train_step(adapter, mine, seed=last)
    theirs.train_step(other, last, last)
    pattern = theirs.model.peft_config["default"].rank_pattern
    stay = {name: torch.tensor(pattern[f"{name}.lora_E.default"]) for name in adapter.layers}
    assert change.after == {name: int(kept.sum()) for name, kept in stay.items()} == adapter.ranks()
    assert sum(adapter.ranks().values()) == 2 * 2
    assert any(not kept[: int(kept.sum())].all() for kept in stay.values())  # not a prefix
    for name, layer in adapter.layers.items():
        close(layer.lora_A.detach(), theirs.factor(name, "lora_A").detach()[stay[name]], 1e-12)
        close(layer.lora_B.detach(), theirs.factor(name, "lora_B").detach()[:, stay[name]], 1e-12)
        close(layer.lora_E.detach(), theirs.factor(name, "lora_E").detach()[stay[name]], 1e-12)
        assert layer.scaling == 9 / (INIT_R + 1e-5) and not layer.pair.statistics()
    assert adapter.method.phase == "final" and not adapter.method.needs_optimizer()


def test_removal_is_peft_s_mask_from_then_on():
    """The penalty aside, which in PEFT goes on seeing what is masked."""
    fields = {"tinit": 2, "tfinal": 12, "orth_reg_weight": 0.0}
    adapter = make(**fields)
    theirs = Peft(adapter, **fields)
    mine, other = optimizer_of(adapter), torch.optim.AdamW(theirs.parameters(), **ADAMW)
    for t in range(1, TOTAL + 1):
        train_step(adapter, mine, seed=t)
        theirs.train_step(other, t, t)
    x, labels = batch(dtype=torch.float64, seed=99)
    assert sum(adapter.ranks().values()) == 4 and adapter.penalty() == 0
    close(adapter.model(x, labels).logits, theirs.model(x, labels).logits, 1e-12)


def test_removal_at_every_update_is_a_mask_that_nothing_leaves():
    """The method written again in plain loops over whole factors, with E of the dead ones at zero."""
    fields = {"tinit": 2, "tfinal": 6, "deltaT": 2, "orth_reg_weight": 0.0, "removal": "update"}
    adapter, plain = make(**fields), make(**fields | {"tfinal": 0, "total_step": 10**6, "tinit": 10**5})
    mine, other = optimizer_of(adapter), torch.optim.AdamW(plain.parameters(), **ADAMW)
    factors = {name: layer.pair.factors() for name, layer in plain.layers.items()}
    state = {(n, f): (torch.zeros_like(v), torch.zeros_like(v)) for n, fs in factors.items() for f, v in fs.items()}
    alive = {name: torch.ones(INIT_R, dtype=torch.bool) for name in plain.layers}
    held = []
    for t in range(1, TOTAL + 1):
        change = train_step(adapter, mine, seed=t)
        plain.model(*batch(dtype=torch.float64, seed=t)).loss.backward()
        other.step()
        for (name, factor), (mean, uncertainty) in state.items() if t < TOTAL - 6 else ():
            p = getattr(plain.layers[name], factor)
            found = (p.detach() * p.grad).abs()
            mean.mul_(0.85).add_(0.15 * found)
            uncertainty.mul_(0.85).add_(0.15 * (found - mean).abs())
        other.zero_grad()
        if (2 < t < TOTAL - 6 and t % 2 == 0) or t == TOTAL - 6:
            score = {key: mean * uncertainty for key, (mean, uncertainty) in state.items()}
            together = {
                n: score[n, "lora_E"][:, 0] + score[n, "lora_A"].mean(1) + score[n, "lora_B"].mean(0) for n in alive
            }
            budget = int((12 - 4) * (1 - (t - 2) / (TOTAL - 6 - 2)) ** 3 + 4)
            ranking = sorted((v.item() for n in alive for v in together[n][alive[n]]), reverse=True)
            for name in alive:
                alive[name] &= together[name] >= ranking[budget - 1]
        for name, layer in plain.layers.items():
            factors[name]["lora_E"][~alive[name]] = 0
            assert adapter.layers[name].rank == alive[name].sum()
            close(adapter.layers[name].lora_A.detach(), layer.lora_A.detach()[alive[name]], 1e-12)
            close(adapter.layers[name].lora_E.detach(), layer.lora_E.detach()[alive[name]], 1e-12)
        assert change is None or change.after == adapter.ranks()
        held.append([adapter.summary()[f"{kind}_bytes"] for kind in ("adapter", "optimizer")])
    # Memory falls with the ranks: factors, AdamW's two moments, and two numbers of sensitivity for each element until the end.
    for now, later in itertools.pairwise(held):
        assert all(b <= a for a, b in zip(now, later, strict=True))
    assert len({bytes for bytes, _ in held}) > 4
    assert all(optimizer == (4 if t < TOTAL - 7 else 2) * factors for t, (factors, optimizer) in enumerate(held))
    history = adapter.method.history()
    assert history["start"] == [INIT_R, INIT_R] and history["steps"] == TOTAL
    ranks = dict(enumerate(history["start"]))
    for _, module, rank in history["changes"]:
        assert rank < ranks[module]
        ranks[module] = rank
    assert list(ranks.values()) == list(adapter.ranks().values())


def test_budget_and_choice_by_hand():
    expected = [12, 12, 12, int(8 * 0.75**3 + 4), int(8 * 0.5**3 + 4), int(8 * 0.25**3 + 4), 4, 4]
    assert [budget_at(t, 12, 4, 2, 6) for t in range(8)] == expected == [12, 12, 12, 7, 5, 4, 4, 4]
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0])
    goes = [lowest(scores, budget) for budget in (5, 4, 3, 2, 1, 0)]
    assert goes == [[], [], [1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]  # of equal ones the first stays


# What removal leaves


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])
def test_optimizer_state_of_the_triplets_that_stay_is_theirs_bit_for_bit(optimizer):
    adapter = make(tinit=2, tfinal=3, removal="update")
    mine = optimizer_of(adapter, optimizer, lr=0.02)
    parameters = adapter.factors()
    for t in range(1, TOTAL):
        loss = adapter.model(*batch(dtype=torch.float64, seed=t)).loss
        (loss + adapter.penalty()).backward()
        mine.step()
        before = {name: (held(layer, mine), layer.pair.statistics()) for name, layer in adapter.layers.items()}
        before = {name: [{k: v.clone() for k, v in part.items()} for part in parts] for name, parts in before.items()}
        scores = {name: triplet_scores(layer.pair) for name, layer in adapter.layers.items()}
        change = adapter.step(loss)
        for name in change.after if change and t < TOTAL - 3 else ():
            stay = scores[name].argsort(descending=True)[: change.after[name]].sort().values
            layer = adapter.layers[name]
            for expected, found in zip(before[name], (held(layer, mine), layer.pair.statistics()), strict=True):
                assert expected.keys() == found.keys() and found
                assert all(torch.equal(found[key], rows[stay]) for key, rows in expected.items())
        mine.zero_grad()
    assert len(adapter.method.changes) > 3 and all(a is b for a, b in zip(parameters, adapter.factors(), strict=True))


def held(layer, optimizer):
    """Factors, gradients and the optimizer's state, rank-major."""
    found = {}
    for name in layer.pair.factor_names:
        p = getattr(layer.pair, name)
        tensors = {"": p.detach(), "grad": p.grad, **optimizer.state[p]}
        for key, value in tensors.items():
            ranked = [dim for dim, size in enumerate(value.shape) if size == layer.rank]
            if value.dim() == 2 and ranked:
                found[f"{name}.{key}"] = value if name != "lora_B" else value.t()
    return found

"""NormAL: scores, budgets, thresholds, schedules and penalties, against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, randomise, task_loss

import adaptlora
from adaptlora.methods.normal import budget_ranks, scores, threshold_ranks
from adaptlora.ops import rank_penalty_ref, rank_shrink_ref


def make(model=None, **fields):
    model = model or Net()
    fields = {"r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": "all-linear", "t_p": 2, "t_c": 3} | fields
    if fields.get("schedule") == "adaptive":
        fields = {name: value for name, value in fields.items() if name not in ("t_p", "t_c")}
    adapter = adaptlora.attach(model, adaptlora.NormALConfig(**fields))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    return adapter, optimizer


def train_step(adapter, optimizer, loss=None):
    task = task_loss(adapter.model, dtype=next(adapter.model.parameters()).dtype)
    (task + adapter.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return adapter.step(task if loss is None else loss)


# Scores: s_r = min(1, (‖a_r‖ + ‖b_r‖) / (‖a_1‖ + ‖b_1‖))


def test_scores_by_hand():
    assert scores([3.0, 1.0, 0.0], [1.0, 1.0, 1.0]) == [1.0, 0.5, 0.25]


def test_scores_are_capped_at_one():
    assert scores([1.0, 5.0, 0.5], [1.0, 0.0, 0.5]) == [1.0, 1.0, 0.5]


def test_scores_with_zero_B():
    assert scores([4.0, 2.0], [0.0, 0.0]) == [1.0, 0.5]


def test_scores_with_a_zero_first_vector():
    assert scores([0.0, 2.0, 7.0], [0.0, 1.0, 0.0]) == [1.0, 0.0, 0.0]


# Budget, Algorithm 3


def test_budget_by_hand():
    # After one each: next scores 0.9, 0.2, 0.6 → module 0; then 0.1, 0.2, 0.6 → module 2; then 0.1, 0.2, 0.5 → module 2.
    module_scores = [[1.0, 0.9, 0.1], [1.0, 0.2, 0.2], [1.0, 0.6, 0.5]]
    assert budget_ranks(module_scores, 3) == [1, 1, 1]
    assert budget_ranks(module_scores, 4) == [2, 1, 1]
    assert budget_ranks(module_scores, 5) == [2, 1, 2]
    assert budget_ranks(module_scores, 6) == [2, 1, 3]
    assert budget_ranks(module_scores, 7) == [2, 2, 3]
    assert budget_ranks(module_scores, 9) == [3, 3, 3]


def test_budget_ties_go_to_the_lower_rank_then_the_earlier_module():
    ones = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert [budget_ranks(ones, k) for k in range(2, 7)] == [[1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    # Module 0's third vector ties at 0.5 with module 1's second: the lower rank goes first.
    assert budget_ranks([[1.0, 0.7, 0.5], [1.0, 0.5, 0.1]], 4) == [2, 2]


def test_budget_looks_only_at_the_next_vector():
    # A strong third vector behind a weak second one waits its turn: what is kept is a prefix.
    assert budget_ranks([[1.0, 0.1, 1.0], [1.0, 0.3, 0.2]], 4) == [1, 3]
    assert budget_ranks([[1.0, 0.1, 1.0], [1.0, 0.3, 0.0]], 5) == [3, 2]


def test_every_module_keeps_one_even_when_its_vectors_are_zero():
    assert budget_ranks([[1.0, 0.0], [1.0, 1.0]], 3) == [1, 2]


@pytest.mark.parametrize("budget", [1, 7, 0, -3])
def test_budget_out_of_range(budget):
    with pytest.raises(
        ValueError, match=rf"between 2 \(one rank for each module\) and 6 \(all ranks together\), got {budget}"
    ):
        budget_ranks([[1.0, 0.5, 0.5]] * 2, budget)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=0, max_size=7), min_size=1, max_size=6), st.data())
def test_budget_is_exact_greedy(tails, data):
    module_scores = [[1.0, *tail] for tail in tails]
    budget = data.draw(st.integers(len(module_scores), sum(map(len, module_scores))))
    ranks = [0] * len(module_scores)
    for _ in range(budget):
        open_ = [i for i, rank in enumerate(ranks) if rank < len(module_scores[i])]
        best = max(open_, key=lambda i: (module_scores[i][ranks[i]], -ranks[i], -i))
        ranks[best] += 1
    assert budget_ranks(module_scores, budget) == ranks and min(ranks) >= 1


# Threshold, Algorithm 2


def test_threshold_keeps_up_to_the_last_above():
    module_scores = [[1.0, 0.3, 0.95, 0.2], [1.0, 0.9, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert threshold_ranks(module_scores, 0.9) == [3, 1, 1, 4]
    assert threshold_ranks(module_scores, 0.9, first_below=True) == [1, 1, 1, 4]
    assert threshold_ranks(module_scores, 0.0) == [4, 4, 1, 4]


# The penalty in the gradient


@pytest.mark.parametrize("kind", ["sqrt", "linear", "square", "cube", "log"])
@pytest.mark.parametrize("mean", [False, True])
def test_gradient_penalty_is_eta_times_P_until_t_p(kind, mean):
    adapter, optimizer = make(penalty=kind, penalty_mean=mean, eta_p=0.03)
    randomise(adapter)
    lora_As = [layer.lora_A for layer in adapter.layers.values()]
    lora_Bs = [layer.lora_B for layer in adapter.layers.values()]
    expected = 0.03 * rank_penalty_ref(lora_As, lora_Bs, kind) / (4 if mean else 1)
    assert torch.allclose(adapter.penalty(), expected, rtol=1e-6)
    phases = []
    for _ in range(4):
        phases.append((adapter.method.phase, bool(adapter.penalty() > 0)))
        train_step(adapter, optimizer)
    assert phases == [("penalty", True), ("penalty", True), ("waiting", False), ("clipped", False)]


def test_no_penalty():
    adapter, _ = make(penalty="none")
    assert adapter.penalty() == 0 and adapter.method.penalty() is None


def test_penalty_gradient_at_zero_B_is_zero():
    adapter, _ = make()
    adapter.penalty().backward()
    for layer in adapter.layers.values():
        assert not layer.lora_B.grad.any() and layer.lora_A.grad.isfinite().all() and layer.lora_A.grad.any()


def test_proximal_penalty_shrinks_after_the_step_until_t_p():
    adapter, first = make(penalty_step="proximal", penalty="linear", eta_p=0.5)
    del first  # an optimizer is tracked as long as it lives
    randomise(adapter)
    optimizer = torch.optim.SGD(
        [
            {"params": [layer.lora_A for layer in adapter.layers.values()], "lr": 0.1},
            {"params": [layer.lora_B for layer in adapter.layers.values()], "lr": 0.4},
        ]
    )
    adapter.track(optimizer)
    assert adapter.penalty() == 0 and adapter.layers["first"].pair.optimizers == [optimizer]
    for step in range(3):
        lora_As = [layer.lora_A.detach().clone() for layer in adapter.layers.values()]
        lora_Bs = [layer.lora_B.detach().clone() for layer in adapter.layers.values()]
        adapter.step(1.0)
        if step < 2:
            lora_As, lora_Bs = rank_shrink_ref(lora_As, lora_Bs, (0.1 * 0.5, 0.4 * 0.5), "linear")
        for layer, A, B in zip(adapter.layers.values(), lora_As, lora_Bs, strict=True):
            torch.testing.assert_close(layer.lora_A.detach(), A[: layer.rank])
            torch.testing.assert_close(layer.lora_B.detach(), B[:, : layer.rank])


@pytest.mark.parametrize(("step", "eta"), [("gradient", 1e-3), ("proximal", 1.0)])
def test_default_eta(step, eta):
    config = adaptlora.NormALConfig(target_modules="all-linear", target_r=4, t_p=1, t_c=1, penalty_step=step)
    assert config.eta_p == eta


# The clip


def set_norms(adapter, name, values):
    """Make ‖a_r‖ = values[r] and b_r = 0 in one module."""
    layer = adapter.layers[name]
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_B.zero_()
        layer.lora_A[:, 0] = torch.tensor(values)


def test_clip_follows_the_norms():
    adapter, _ = make(target_modules=["first", "second"], t_p=1, t_c=1, penalty="none")
    set_norms(adapter, "first", [2.0, 1.8, 1.6, 0.1])
    set_norms(adapter, "second", [5.0, 0.5, 0.4, 0.3])
    change = adapter.step(1.0)
    assert change.before == {"first": 4, "second": 4} and change.after == {"first": 3, "second": 1} == adapter.ranks()
    assert change.step == 1 and adapter.method.phase == "clipped"
    assert adapter.step(1.0) is None


def test_threshold_clip():
    adapter, _ = make(target_modules=["first", "second"], target_r=None, threshold=0.5, t_p=1, t_c=1, penalty="none")
    set_norms(adapter, "first", [2.0, 0.1, 1.6, 0.1])
    set_norms(adapter, "second", [5.0, 0.5, 0.4, 0.3])
    assert adapter.step(1.0).after == {"first": 3, "second": 1}


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 8 / 3), (True, 8 / math.sqrt(3))])
def test_scaling_stays_unless_rescaled(use_rslora, scaling):
    for rescale in (False, True):
        adapter, _ = make(
            target_modules=["first", "second"], t_p=1, t_c=1, penalty="none", rescale=rescale, use_rslora=use_rslora
        )
        set_norms(adapter, "first", [2.0, 1.8, 1.6, 0.1])
        set_norms(adapter, "second", [5.0, 0.5, 0.4, 0.3])
        before = adapter.layers["first"].scaling
        adapter.step(1.0)
        assert adapter.layers["first"].scaling == pytest.approx(scaling if rescale else before)


def test_kept_vectors_and_state_survive_bit_for_bit():
    adapter, optimizer = make(t_p=1, t_c=2, target_r=2)
    train_step(adapter, optimizer)
    task = task_loss(adapter.model)
    (task + adapter.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {
        id(p): {"p": p.detach().clone()} | {k: v.clone() for k, v in optimizer.state[p].items()}
        for p in adapter.factors()
    }
    assert adapter.step(task) is not None
    for layer in adapter.layers.values():
        for parameter, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
            for key, old in before[id(parameter)].items():
                new = parameter.detach() if key == "p" else optimizer.state[parameter][key]
                assert torch.equal(new, old.narrow(dim, 0, layer.rank) if old.dim() else old), key


@pytest.mark.parametrize("target_r", [0.4, 4.3])
def test_target_r_out_of_range_changes_nothing(target_r):
    model = Net()
    with pytest.raises(ValueError, match=r"budget must be between 2 .* and 8 .*, got"):
        make(model, target_r=target_r)
    assert type(model.first) is torch.nn.Linear and all(p.requires_grad for p in model.parameters())


def test_budget_at_both_limits():
    for budget, ranks in ((2, [1, 1]), (8, [4, 4])):
        adapter, optimizer = make(target_r=None, budget=budget, t_p=1, t_c=1)
        train_step(adapter, optimizer)
        assert list(adapter.ranks().values()) == ranks


def test_rank_pattern_counts_in_the_budget():
    adapter, optimizer = make(target_r=None, budget=7, rank_pattern={"second": 3}, t_p=1, t_c=1)
    train_step(adapter, optimizer)
    assert adapter.ranks() == {"first": 4, "second": 3}


def test_nan_norms_stop_the_clip():
    adapter, _ = make(t_p=1, t_c=1, penalty="none")
    with torch.no_grad():
        adapter.layers["second"].lora_A[1, 1] = float("nan")
    with pytest.raises(ValueError, match="second: norms of the rank vectors must be finite"):
        adapter.step(1.0)
    assert list(adapter.ranks().values()) == [4, 4] and adapter.method.t == 0


# Adaptive t_p and t_c, Eq. 6


def test_adaptive_schedule_by_hand():
    adapter, _ = make(schedule="adaptive", min_steps=3, ema=0.5, lambda_p=0.2, lambda_c=0.1, penalty="none")
    # |ΔL| = 1, 0.1, 0.1, 0.3, 0.1, 0.01; Δ̂ = 1, 0.55, 0.325, 0.3125, 0.20625, 0.108125 with α = 0.5.
    losses = [3.0, 2.0, 1.9, 1.8, 1.5, 1.4, 1.39]
    for loss in losses:
        assert adapter.step(loss) is None
    assert adapter.method.t_p == 7 and adapter.method.phase == "waiting" and adapter.method.t_c is None
    # Δ̂ starts afresh: 0.19, then 0.095 < λ_c.
    assert adapter.step(1.2) is None
    assert adapter.step(1.2) is not None
    assert adapter.method.t_c == 9 and adapter.method.phase == "clipped"


def test_adaptive_waits_for_min_steps():
    adapter, optimizer = make(schedule="adaptive", min_steps=5, penalty="none")
    assert adapter.layers["first"].pair.optimizers == [optimizer]
    for _ in range(4):
        adapter.step(1.0)
    assert adapter.method.t_p is None
    adapter.step(1.0)
    assert adapter.method.t_p == 5
    adapter.step(1.0)
    assert adapter.method.t_c == 6


def test_max_steps_forces_what_is_undecided():
    adapter, _ = make(schedule="adaptive", min_steps=2, max_steps=6, penalty="none")
    changes = [adapter.step(float(10 * (step % 2))) for step in range(6)]
    assert changes[:5] == [None] * 5 and changes[5] is not None
    assert (adapter.method.t_p, adapter.method.t_c) == (6, 6)


def test_adaptive_needs_the_loss():
    adapter, _ = make(schedule="adaptive")
    with pytest.raises(ValueError, match="step: loss must be given to an adaptive schedule, got None"):
        adapter.step()


# Bad configurations


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r must be an integer > 0, got 0"),
        ({"r": 2.5}, "r must be an integer > 0, got 2.5"),
        ({"lora_alpha": 0}, "lora_alpha must be a number > 0, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"target_modules": None}, "target_modules must name modules"),
        ({"target_modules": []}, "target_modules must name modules"),
        ({"rank_pattern": {"first": 0}}, r"rank_pattern\['first'\] must be > 0, got 0"),
        ({"alpha_pattern": {"first": -1}}, r"alpha_pattern\['first'\] must be > 0, got -1"),
        ({"bias": "all"}, "bias must be \"none\", got 'all'"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list"),
        ({"penalty": "exp"}, "penalty must be one of sqrt, linear, square, cube, log, none, got 'exp'"),
        ({"penalty_step": "late"}, "penalty_step must be"),
        ({"eta_p": -1}, "eta_p must be a number ≥ 0, got -1"),
        ({"t_p": 5, "t_c": 4}, "t_c must be an integer ≥ t_p=5, got 4"),
        ({"t_p": 0}, r"t_p must be an integer > 0 \(with t_c\), got 0"),
        ({"t_c": None}, "t_c must be an integer ≥ t_p=2, got None"),
        ({"schedule": "sometimes"}, 'schedule must be "fixed" or "adaptive"'),
        ({"threshold": 0.9}, "exactly one of target_r, budget and threshold must be given, got target_r, threshold"),
        ({"target_r": None}, "exactly one of target_r, budget and threshold must be given, got none"),
        ({"target_r": None, "threshold": 1.0}, r"threshold must be in \[0, 1\), got 1.0"),
        ({"target_r": None, "budget": 2.5}, "budget must be an integer > 0, got 2.5"),
        ({"target_r": float("nan")}, "target_r must be a number > 0, got nan"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"max_steps": 3}, "max_steps must be None or an integer ≥ min_steps=50, got 3"),
    ],
)
def test_bad_configurations(fields, text):
    good = {"target_modules": "all-linear", "target_r": 2, "t_p": 2, "t_c": 3}
    with pytest.raises(ValueError, match=text):
        adaptlora.NormALConfig(**good | fields)


def test_adaptive_schedule_takes_no_fixed_steps():
    with pytest.raises(ValueError, match='t_p must be None with schedule="adaptive", got 2'):
        adaptlora.NormALConfig(target_modules="all-linear", target_r=2, schedule="adaptive", t_p=2)

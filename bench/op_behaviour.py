"""How every registered op behaves in torch: what opcheck says, and how often torch.compile compiles over eleven ranks.

make op-behaviour, or [TRITON_INTERPRET=1] PYTHONPATH=tests python bench/op_behaviour.py [--backend triton]
"""

import argparse
import os
import sys

import torch
from rich.console import Console
from rich.table import Table
from test_recompilation import RANKS, compilations, delta, group, linear

from adaptlora.ops import _library  # noqa: F401  (defines the ops)

ops = torch.ops.adaptlora
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
COMPILED = {"lora_linear": linear, "lora_group": group, "lora_delta_": delta}


def samples() -> dict[str, tuple]:
    """Arguments of every op of the library, by name."""
    M, K, N, R, scaling, p = 6, 20, 17, 5, 0.75, 0.3

    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)

    x, A, E, seed = leaf(M, K), leaf(R, K), leaf(R), torch.tensor(3)
    B, dy, s = torch.randn(R, N).t().requires_grad_(), torch.randn(M, N), torch.randn(M, R)
    weight, bias, y = torch.randn(N, K), torch.randn(N), torch.randn(M, N)
    plain = [t.detach() for t in (x, A, B, E)]
    pair, need = ([A, A[:2]], [B, B[:, :2]]), [True] * 4
    plain_pair = [[t.detach() for t in side] for side in pair]
    group_tail = ([E, E[:2]], [seed, seed + 1], [scaling, 1.0], p)
    plain_group_tail = ([plain[3], plain[3][:2]], *group_tail[1:])
    return {
        "lora_linear": (x, weight, bias, A, B, E, seed, scaling, p),
        "lora_linear_backward": (dy, plain[0], weight, s, *plain[1:], seed, scaling, p, need),
        "lora_delta": (y, x, A, B, E, seed, scaling, p),
        "lora_delta_": (y.clone(), *plain, seed, scaling, p),
        "lora_delta_backward": (dy, plain[0], s, *plain[1:], seed, scaling, p, need),
        "lora_group": (x, [weight] * 2, [bias] * 2, *pair, *group_tail),
        "lora_group_backward": (
            [dy, dy], plain[0], [weight] * 2, torch.randn(M, R + 2), *plain_pair, *plain_group_tail,
            True, [True] * 2, [True] * 2, [True] * 2,
        ),
        "rank_norms": pair,
        "rank_scale": (*plain_pair, torch.randn(R + 2), torch.randn(R + 2)),
        "rank_shrink_": (*[[t.clone() for t in side] for side in plain_pair], 0.1, 0.1, "sqrt"),
        "rank_gather": ([plain[1], plain[2].t()], torch.tensor([2, 0, 1]), [2, 1]),
        "compose": (leaf(R, 7), torch.randn(R, 7).t().requires_grad_(), torch.randn(7, K), torch.randn(7, N)),
        "compose_backward": (torch.randn(R, K), torch.randn(R, N).t(), torch.randn(7, K), torch.randn(7, N), [True] * 2),
        "low_rank_svd": plain_pair,
        "randomized_svd": ([weight, weight, torch.randn(3, 4)], 3, 2, 1, 1e-5, 0),
        "subspace_overlap": (torch.randn(2, N, 4), torch.randn(2, N, 3)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpp", help="reference, cpp, or triton under TRITON_INTERPRET=1")
    os.environ["ADAPTLORA_BACKEND"] = parser.parse_args().backend
    torch.manual_seed(0)
    arguments, table, failed = samples(), Table(title=f"backend {os.environ['ADAPTLORA_BACKEND']}"), False
    for column in ("op", *(check.removeprefix("test_") for check in CHECKS), f"compilations, {len(RANKS)} ranks"):
        table.add_column(column)
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "adaptlora::" in name
    }
    assert registered == arguments.keys(), registered ^ arguments.keys()
    for name in sorted(registered):
        outcome = torch.library.opcheck(getattr(ops, name).default, arguments[name], raise_exception=False)
        failed = failed or any(result != "SUCCESS" for result in outcome.values())
        compiled = str(compilations(COMPILED[name])) if name in COMPILED else "–"
        table.add_row(name, *("passes" if outcome[check] == "SUCCESS" else "FAILS" for check in CHECKS), compiled)
    Console(width=120).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

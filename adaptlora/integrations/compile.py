"""torch.compile around ranks that change."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def dynamic_ranks() -> Iterator[None]:
    """
    Within, torch.compile compiles for any rank: a model whose ranks change is compiled once more at the first change, and never again.

    By default dynamo takes the shape of a parameter for a constant, so that every new rank compiles again until it gives up
    (torch 2.13: after eight), and sizes 0 and 1 for special. Both settings are read when code is compiled: keep the calls of
    the compiled model, not only torch.compile itself, inside. They are torch's own and restored at the end.
    """
    import torch._dynamo
    import torch.fx.experimental._config

    with (
        torch._dynamo.config.patch(force_parameter_static_shapes=False),
        torch.fx.experimental._config.patch(backed_size_oblivious=True),
    ):
        yield

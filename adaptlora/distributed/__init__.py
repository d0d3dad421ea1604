"""Training with several processes: gradients in one buffer, ranks that change on all of them together."""

from importlib import import_module

# DCP and FSDP take long to import, and few need them.
_HOMES = {
    "AdapterState": "torch_checkpoint",
    "load_distributed": "torch_checkpoint",
    "leave_out": "fsdp",
    "broadcast_state": "state",
}
__all__ = ["AdapterState", "broadcast_state", "leave_out", "load_distributed"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The options of `Adapter.save` that belong to some of its formats only."""

# (default, the formats that have it)
_OPTIONS = {
    "fold_residual": (True, ("peft", "vllm")),
    "save_outer": (False, ("nora",)),
    "pad": (False, ("vllm",)),
    "max_shard_size": ("5GB", ("merged",)),
}


def check_options(format: str, **given) -> None:
    """Raises: ValueError if an option of another format is not at its default."""
    for option, value in given.items():
        default, formats = _OPTIONS[option]
        if format not in formats and value != default:
            rule = " or ".join(f'"{name}"' for name in formats)
            raise ValueError(
                f"save: {option} must be {default!r} unless format is {rule}, got {value!r} for {format!r}"
            )

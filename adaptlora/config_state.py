"""A configuration in a checkpoint, and whether an adapter has the same in what the steps to come depend on."""

import dataclasses
import json


def config_state(adapter) -> dict:
    """{"class": name, "fields": {field: JSON}} of the adapter's configuration, without the `start_fields` of its method."""
    config = adapter.config
    names = {field.name for field in dataclasses.fields(config)} - adapter.method.start_fields
    values = {name: _as_json(getattr(config, name)) for name in sorted(names)}
    return {
        "class": type(config).__name__,
        "fields": {name: value for name, value in values.items() if value is not _OTHER},
    }


_OTHER = object()


def _as_json(value):
    """What reading JSON gives back, a tuple as a list; _OTHER for what it cannot hold, in a configuration of one's own."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return _OTHER


def check_config_state(adapter, stored: dict | str) -> None:
    """
    Args: stored: what `config_state` gave; older checkpoints have the class's name alone.
    Raises: ValueError (another class; a field with another value, of those that both have).
    """
    mine = config_state(adapter)
    if isinstance(stored, str):
        stored = {"class": stored, "fields": {}}
    if stored["class"] != mine["class"]:
        raise ValueError(f"the adapter must be attached with a {stored['class']}, got a {mine['class']}")
    pairs = {name: (value, mine["fields"][name]) for name, value in stored["fields"].items() if name in mine["fields"]}
    different = [f"{name} must be {there!r}, got {here!r}" for name, (there, here) in pairs.items() if there != here]
    if different:
        raise ValueError(f"config must be the one that was saved: {'; '.join(different)}")

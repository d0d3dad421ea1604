"""PEFT's LoraConfig as fields of ours: each of its fields is translated, says nothing about training, or is refused by name."""

import dataclasses

# Of the same name and meaning.
_SAME = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
)
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")  # which PEFT may hold as sets
# What a file says of itself, what only other fields make use of, and what is seen from the modules (fan_in_fan_out).
_SILENT = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
# What PEFT's AdaLoraConfig has beside a LoraConfig's fields; its r is without effect.
_ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_INITS = {True: "kaiming", "pissa": "pissa"}
# Tasks for which PEFT also trains a head, by names of its own.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def fields_from_peft(op: str, peft_config, given, *, adalora: bool = False) -> dict:
    """
    {field: value} of a LoraConfig of ours that means the same, without the fields `given`, which the caller has.

    Args: adalora: of an AdaLoRAConfig, also from PEFT's AdaLoraConfig; the r of a LoraConfig is init_r.
    Raises: TypeError (no PEFT configuration), ValueError (another kind of adapter; a field that has no counterpart and is not at its
        default; a task for which PEFT chooses modules_to_save, or targets that it chooses by the kind of model).
    """
    instance = dataclasses.is_dataclass(peft_config) and not isinstance(peft_config, type)
    if not (instance and hasattr(peft_config, "peft_type")):
        raise TypeError(f"{op}: peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}")
    kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    kinds = ("LORA", "ADALORA") if adalora else ("LORA",)
    if kind not in kinds:
        rule = " or ".join(f'"{name}"' for name in kinds)
        raise ValueError(f"{op}: peft_type must be {rule}, got {kind!r}")
    silent = _SILENT | ({"r"} if kind == "ADALORA" else set())
    fields = {}
    for field in dataclasses.fields(peft_config):
        name, value = field.name, getattr(peft_config, field.name)
        if adalora and kind == "LORA" and name == "r":
            name = "init_r"
        if name in given or name in silent:
            continue
        if name == "layers_to_transform" and isinstance(value, (tuple, range)):
            fields[name] = list(value)
        elif name in _SAME or (adalora and name in _ADALORA):
            fields[name] = value
        elif name in _NAMES:
            fields[name] = sorted(value) if isinstance(value, (set, tuple)) else value
        elif name == "init_lora_weights":
            fields[name] = _init(op, value)
        elif value and value != _default(field):
            raise ValueError(
                f"{op}: {name} must be {_default(field)!r}, which is all that has a counterpart, got {value!r}"
            )
    fields |= {
        pattern: dict(fields[pattern] or {}) for pattern in ("rank_pattern", "alpha_pattern") if pattern in fields
    }
    _check_choices(op, peft_config, fields)
    return fields


def _default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _init(op: str, value) -> str:
    found = _INITS.get(value) if isinstance(value, (bool, str)) else None
    if found is None:
        raise ValueError(f'{op}: init_lora_weights must be True or "pissa", or be given anew, got {value!r}')
    return found


def _check_choices(op: str, peft_config, fields: dict) -> None:
    """Raises: ValueError where PEFT would choose by what the model is."""
    if "target_modules" in fields and not fields["target_modules"]:
        raise ValueError(f"{op}: target_modules must be given: PEFT chooses by the kind of model, got None")
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    saved = fields.get("modules_to_save") or ()
    if task in _HEADS and "modules_to_save" in fields and not any(n.rpartition(".")[2] in _HEADS[task] for n in saved):
        raise ValueError(
            f"{op}: modules_to_save must name the head, or be given anew, for task_type {task!r}: PEFT trains it whole "
            f"({' or '.join(_HEADS[task])}), got {fields['modules_to_save']}"
        )

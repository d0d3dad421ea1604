"""
pytest plugin for PEFT's own tests, which stay as they are: accelerates every LoRA model as soon as adapters are injected.

ADAPTLORA_PEFT_SUITE names the JSON file that takes the outcomes; ADAPTLORA_PEFT_ACCELERATE=1 accelerates, without it PEFT runs alone.
"""

import functools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

# Tests that are about LoRA as a whole; of other files those whose names have it as a word.
WHOLE_FILES = {
    "test_arrow.py",
    "test_bdlora.py",
    "test_helpers.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lora_variants.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_quantization.py",
    "test_target_parameters.py",
    "test_torch_compile.py",
    "test_tuners_utils.py",
    "test_velora.py",
}
_LORA = re.compile(r"(?<![a-zA-Z])lora|TestLora", re.IGNORECASE)
calls = Counter()


def _counted(name: str, function):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return counted


def _accelerate_injections() -> None:
    from peft.tuners.mixed import MixedModel
    from peft.tuners.tuners_utils import BaseTuner

    import adaptlora
    from adaptlora.integrations import peft_layers

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def injected(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        if isinstance(self, MixedModel) or self.prefix == "lora_":
            try:
                found = adaptlora.accelerate(model)
            except ValueError:  # a MixedModel without LoRA
                return result
            calls["layers accelerated"] += len(found.accelerated)
            calls["layers kept"] += len(found.kept)
        return result

    BaseTuner.inject_adapter = injected
    for op in ("lora_linear", "lora_delta_"):
        setattr(peft_layers, op, _counted(op, getattr(peft_layers, op)))
    peft_layers._Accelerated.forward = _counted("forward calls", peft_layers._Accelerated.forward)


class _Everything(dict):
    """The names of models that are in the cache, for tests that go to the hub for those that are not."""

    def __contains__(self, name) -> bool:
        self.setdefault(name, 0)
        return True


class Outcomes:
    def __init__(self, path: Path):
        self.path, self.tests = path, {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        calls.clear()
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        outcome = yield
        if call.when == "call":
            outcome.get_result().user_properties.append(("calls", dict(calls)))

    def pytest_collectreport(self, report) -> None:
        if report.failed:  # a whole file
            self.tests[report.nodeid] = {"outcome": "failed", "reason": str(report.longrepr)[-2000:], "calls": {}}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.passed:
            return
        reason = ""
        if report.skipped:
            reason = getattr(report, "wasxfail", "") or str(report.longrepr[2] if report.longrepr else "")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
        found = {
            "outcome": report.outcome,
            "reason": reason[:2000],
            "calls": dict(report.user_properties).get("calls", {}),
        }
        if self.tests.get(report.nodeid, {}).get("outcome") != "failed":
            self.tests[report.nodeid] = found

    def pytest_sessionfinish(self, session) -> None:
        if not hasattr(session.config, "workerinput"):
            self.path.write_text(json.dumps(self.tests, indent=1))


def pytest_configure(config) -> None:
    config.pluginmanager.register(Outcomes(Path(os.environ["ADAPTLORA_PEFT_SUITE"])))
    if os.environ.get("ADAPTLORA_PEFT_ACCELERATE") == "1":
        _accelerate_injections()


def pytest_collection_modifyitems(config, items) -> None:
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = _Everything()
    chosen = [item for item in items if item.path.name in WHOLE_FILES or _LORA.search(item.nodeid.split("::", 1)[1])]
    kept = set(chosen)
    left = [item for item in items if item not in kept]
    config.hook.pytest_deselected(items=left)
    items[:] = chosen

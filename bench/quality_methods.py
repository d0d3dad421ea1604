"""The methods that the quality tables compare, each one object that a loop drives: ours on adaptlora, the others as PEFT has them."""

import peft
import torch
from torch import nn

import adaptlora

NORMAL, LALORA, NORA, LORA = "normal", "lalora", "nora", "lora"
OURS = {
    NORMAL: adaptlora.NormALConfig,
    LALORA: adaptlora.LaLoRAConfig,
    NORA: adaptlora.NoRAConfig,
    LORA: adaptlora.LoraConfig,
}
PEFT_LORA, PEFT_ADALORA, PEFT_DORA, PEFT_PISSA = "peft-lora", "peft-adalora", "peft-dora", "peft-pissa"
PEFTS = (PEFT_LORA, PEFT_ADALORA, PEFT_DORA, PEFT_PISSA)


class OurRun:
    """An Adapter in training."""

    def __init__(
        self, model: nn.Module, method: str, fields: dict, *, heads: list[str], targets, steps: int, seed: int
    ):
        if method == NORMAL:
            fields = {"t_p": round(steps / 3), "t_c": round(steps * 7 / 18)} | fields
        config = OURS[method](**fields, target_modules=targets, modules_to_save=heads or None, seed=seed)
        self.adapter = adaptlora.attach(model, config)
        self.model = model

    def parameters(self):
        return self.adapter.parameters()

    def track(self, optimizer) -> None:
        self.adapter.track(optimizer)

    def penalty(self):
        return self.adapter.penalty()

    def with_gradients(self, step: int) -> None:
        """After the optimizer's step, before the gradients go."""

    def after(self, loss: float) -> None:
        self.adapter.step(loss)

    def result(self) -> dict:
        """What is left at the end: ranks by module and the adapter's parameters, heads left out."""
        self.adapter.compact()
        return {
            "ranks": list(self.adapter.ranks().values()),
            "parameters": self.adapter.summary()["adapter_parameters"],
        }


class PeftRun:
    """A PeftModel in training; AdaLoRA's with the allocation that it wants after every step."""

    def __init__(
        self, model: nn.Module, method: str, fields: dict, *, heads: list[str], targets, steps: int, seed: int
    ):
        common = {"target_modules": targets, "modules_to_save": heads or None}
        self.adalora = method == PEFT_ADALORA
        if self.adalora:
            # As in this package's AdaLoRA: a sixth of the steps with all triplets, a third with those that stay.
            schedule = {"total_step": steps, "tinit": steps // 6, "tfinal": steps // 3, "deltaT": 1}
            config = peft.AdaLoraConfig(**schedule, **fields, **common)
        else:
            how = {PEFT_DORA: {"use_dora": True}, PEFT_PISSA: {"init_lora_weights": "pissa_niter_16"}}.get(method, {})
            config = peft.LoraConfig(**how, **fields, **common)
        torch.manual_seed(seed)  # of the factors
        whole = peft.get_peft_model(model, config)
        # Without a task type a PeftModel calls what is in the tuner and leaves AdaLoRA's regularisation out.
        self.model = whole.base_model
        self.r = config.init_r if self.adalora else config.r

    def parameters(self):
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def track(self, optimizer) -> None:
        pass

    def penalty(self):
        return 0.0

    def with_gradients(self, step: int) -> None:
        if self.adalora:
            self.model.update_and_allocate(step)

    def after(self, loss: float) -> None:
        pass

    def result(self) -> dict:
        if not self.adalora:
            factors = [p.numel() for name, p in self.model.named_parameters() if ".lora_" in name and p.requires_grad]
            modules = sum(".lora_A" in name for name, _ in self.model.named_parameters())
            return {"ranks": [self.r] * modules, "parameters": sum(factors)}
        layers = [m for m in self.model.modules() if isinstance(m, peft.tuners.adalora.SVDLinear)]
        ranks = [int((layer.lora_E["default"] != 0).sum()) for layer in layers]
        # A triplet that was masked is multiplied by 0 and stays in the file; counted are those that compute.
        sizes = [layer.in_features + layer.out_features + 1 for layer in layers]
        return {"ranks": ranks, "parameters": sum(r * size for r, size in zip(ranks, sizes, strict=True))}


def start(model: nn.Module, method: str, fields: dict, **where) -> OurRun | PeftRun:
    return (PeftRun if method in PEFTS else OurRun)(model, method, fields, **where)

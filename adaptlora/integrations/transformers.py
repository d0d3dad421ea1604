"""The transformers callback: `Trainer(model, …, callbacks=[adapter.callback()])` runs the whole method."""

import json
import warnings
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

ADAPTER_FOLDER = "adapter"


class AdapterCallback(TrainerCallback, ExportableState):
    """
    Adds the penalty's gradient once per optimizer step, whatever the loss is, and lets the method decide after it.

    The penalty is differentiated at the start of a step, before its first micro-batch, so that gradient accumulation sums the
    task's gradients onto it and clipping sees both: the same gradient as that of loss + penalty. Steps are optimizer steps.
    Adaptive schedules read the model's own `loss` output. Each checkpoint gets a PEFT adapter in its folder `adapter/`, and
    the method's state in its trainer_state.json, from which `resume_from_checkpoint` and `load_best_model_at_end` take it.
    """

    def __init__(self, adapter):
        self.adapter = adapter
        self._losses = []
        self._hook = None

    def state(self) -> dict:
        """What Trainer writes into a checkpoint beside the model's own tensors."""
        scalings = {name: layer.scaling for name, layer in self.adapter.layers.items()}
        return {"args": {}, "attributes": {"method": self.adapter.method.state_dict(), "scalings": scalings}}

    def _restore(self, stateful_callbacks: dict) -> None:
        saved = stateful_callbacks.get(type(self).__name__)
        if saved:
            self.adapter.method.load_state_dict(saved["attributes"]["method"])
            for name, scaling in saved["attributes"]["scalings"].items():
                self.adapter.layers[name].scaling = scaling

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step:
            self._restore(state.stateful_callbacks)
        method = self.adapter.method
        last = method.t + state.max_steps - state.global_step
        if method.awaits_clip() and method.t_c is not None and method.t_c >= last:
            raise ValueError(
                f"Trainer: t_c must be less than the {last} steps that the method will have seen, got {method.t_c}"
            )
        self.adapter.track(optimizer)
        self._losses.clear()
        self._remove_hook()
        if method.needs_loss():
            self._hook = self.adapter.model.register_forward_hook(self._record_loss, with_kwargs=True)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _record_loss(self, model, inputs, keywords, output):
        loss = output.get("loss") if hasattr(output, "get") else None
        if model.training and loss is not None:
            self._losses.append((loss.detach(), keywords.get("num_items_in_batch") is not None))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self._losses.clear()
        penalty = self.adapter.method.penalty()
        if penalty is not None:
            scaler = getattr(optimizer, "scaler", None)
            (penalty if scaler is None else scaler.scale(penalty)).backward()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            self.adapter.step(self._step_loss())

    def _step_loss(self):
        if not self._losses:
            if self.adapter.method.needs_loss():
                raise ValueError(
                    'Trainer: the model must return its loss for schedule="adaptive" (label smoothing and a compute_loss of your '
                    "own take the labels from it), got none; give t_p and t_c instead"
                )
            return None
        losses = [float(loss) for loss, _ in self._losses]
        # With num_items_in_batch each micro-batch holds its share of the step's mean; without it, its own mean.
        shares = all(share for _, share in self._losses)
        return sum(losses) / (1 if shares else len(losses))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.adapter.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / ADAPTER_FOLDER)

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hook()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            file = Path(state.best_model_checkpoint) / "trainer_state.json"
            self._restore(json.loads(file.read_text(encoding="utf-8"))["stateful_callbacks"])
        if self.adapter.method.awaits_clip():
            warnings.warn(
                f"the ranks were not changed in {self.adapter.method.t} steps (phase: {self.adapter.method.phase}); "
                "set t_p and t_c, or max_steps for an adaptive schedule",
                stacklevel=2,
            )

"""The transformers callback: `Trainer(model, …, callbacks=[adapter.callback()])` runs the whole method."""

from pathlib import Path

from transformers import TrainerCallback

ADAPTER_FOLDER = "adapter"


class AdapterCallback(TrainerCallback):
    """
    Adds the penalty's gradient once per optimizer step, whatever the loss is, and lets the method decide after it.

    The penalty is differentiated at the start of a step, before its first micro-batch, so that gradient accumulation sums the
    task's gradients onto it and clipping sees both: the same gradient as that of loss + penalty. Steps are optimizer steps.
    Adaptive schedules read the model's own `loss` output. Each checkpoint gets a PEFT adapter in its folder `adapter/`.
    """

    def __init__(self, adapter):
        self.adapter = adapter
        self._losses = []
        self._hook = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.adapter.track(optimizer)
        self._losses.clear()
        if self.adapter.method.needs_loss():
            self._hook = self.adapter.model.register_forward_hook(self._record_loss, with_kwargs=True)

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
            return None
        losses = [float(loss) for loss, _ in self._losses]
        # With num_items_in_batch each micro-batch holds its share of the step's mean; without it, its own mean.
        shares = all(share for _, share in self._losses)
        return sum(losses) / (1 if shares else len(losses))

    def on_save(self, args, state, control, **kwargs):
        self.adapter.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / ADAPTER_FOLDER)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

"""The transformers callback: `Trainer(model, …, callbacks=[adapter.callback()])` runs the whole method, TRL's trainers too."""

import contextlib
import functools
import inspect
import json
import warnings
from pathlib import Path

from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..config_state import check_config_state, config_state
from ..logs import log_values
from ..methods import NonFiniteError
from . import trainer_checkpoint
from .compile import dynamic_ranks

ADAPTER_FOLDER = "adapter"


def _running_trainer() -> Trainer | None:
    """The Trainer whose event is being handled, from the stack: transformers gives callbacks no reference to it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def _made_contiguous(module, state_dict, prefix, local_metadata) -> None:
    for name, tensor in state_dict.items():
        if not tensor.requires_grad:  # parameters that are asked for as they are stay
            state_dict[name] = tensor.contiguous()


class AdapterCallback(TrainerCallback, ExportableState):
    """
    Adds the penalty's gradient once per optimizer step, whatever the loss is, and lets the method decide after it.

    The penalty is differentiated at the start of a step, before its first micro-batch, so that gradient accumulation sums the
    task's gradients onto it and clipping sees both: the same gradient as that of loss + penalty. Steps are optimizer steps that were
    made: one that a GradScaler skips does not count. Adaptive schedules read the loss that Trainer differentiates, its own, the
    model's or yours. Where the loss or the norms are not finite the method's step is refused with a warning, training goes on, and the
    method does after the next step what it was to do.

    Every training log gets `log_values`. Each checkpoint gets a PEFT adapter in its folder `adapter/`, the method's state in its
    trainer_state.json, from which `resume_from_checkpoint` and `load_best_model_at_end` take it, and last a list of checksums: one
    that is damaged or half-written is refused by name, and `adaptlora.last_checkpoint(output_dir)` finds the one before it. Under
    torch_compile one compilation serves all ranks. Among several processes (torchrun, accelerate launch) the adapter is distributed when
    training begins, see `Adapter.distribute`.

    Args:
        log_modules: also log every module's rank.
    """

    def __init__(self, adapter, *, log_modules: bool = False):
        self.adapter = adapter
        self.log_modules = log_modules
        self._losses = []
        self._refused = 0
        self._unsaved = False  # whether a warning has said that weights are not finite
        self._scale: float | None = None  # a GradScaler's, before the optimizer's step
        self._training = contextlib.ExitStack()  # what is set up for the time of a training
        # Trainer's constructor refuses quantised models that have no adapter of PEFT's; after it nothing asks.
        self._quantised = getattr(adapter.model, "is_quantized", False)
        if self._quantised:
            adapter.model.is_quantized = False
        if not isinstance(adapter.model, PreTrainedModel):
            # Trainer hands the state of other models to safetensors as it is, which takes no transposed tensors.
            adapter.model.register_state_dict_post_hook(_made_contiguous)

    def state(self) -> dict:
        """What Trainer writes into a checkpoint beside the model's own tensors."""
        scalings = {name: layer.scaling for name, layer in self.adapter.layers.items()}
        groups = self.adapter._groups.state()
        attributes = {"method": self.adapter.method.state_dict(), "scalings": scalings, "groups": groups}
        attributes |= {"config": config_state(self.adapter), "processes": self.adapter.processes.size}
        return {"args": {}, "attributes": attributes}

    def _restore(self, stateful_callbacks: dict) -> None:
        saved = stateful_callbacks.get(type(self).__name__)
        if not saved:
            raise ValueError(
                f"Trainer: the checkpoint must hold the state of {type(self).__name__}, as it does if it was written with "
                f"callbacks=[adapter.callback()], got {sorted(stateful_callbacks)}"
            )
        method, scalings = saved["attributes"]["method"], saved["attributes"]["scalings"]
        mine = self.state()["attributes"]
        for field, found, expected in (("modules", scalings, mine["scalings"]), ("method", method, mine["method"])):
            if found.keys() != expected.keys():
                different = sorted(found.keys() ^ expected.keys())
                raise ValueError(
                    f"Trainer: the checkpoint must be of this adapter's {field} (attach with the configuration it was made with), "
                    f"got a difference in {different[:5]}"
                )
        if "config" in saved["attributes"]:  # older checkpoints have none
            try:
                check_config_state(self.adapter, saved["attributes"]["config"])
            except ValueError as error:
                raise ValueError(f"Trainer: {error}") from error
        groups = saved["attributes"].get("groups", {})
        self.adapter._groups.check_state(groups)
        self.adapter.method.check_state(method)
        self.adapter.method.load_state_dict(method)
        self.adapter._groups.take_state(groups)
        for name, scaling in scalings.items():
            self.adapter.layers[name].scaling = scaling

    def on_init_end(self, args, state, control, **kwargs):
        if self._quantised:
            self.adapter.model.is_quantized = True
        trainer = _running_trainer()
        plugin = None if trainer is None else getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            from ..distributed.fsdp import leave_out

            leave_out(plugin, self.adapter, trainer.accelerator.device)

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self._training.close()  # of a training that an error ended
        trainer = _running_trainer()
        if args.world_size > 1:
            self._distribute(trainer)
        processes, first = self.adapter.processes, state.is_world_process_zero
        trainer_checkpoint.check_resumed(
            args.output_dir, state, optimizer, lr_scheduler, first=first, processes=processes
        )
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
        self._refused = 0
        self._unsaved = False
        if trainer is not None:
            self._go_first(trainer.callback_handler.callbacks)
            if method.needs_loss():
                self._watch_losses(trainer)
        if args.torch_compile and method.needs_optimizer():
            self._training.enter_context(dynamic_ranks(self.adapter))

    def _distribute(self, trainer: Trainer | None) -> None:
        if trainer is None:
            raise ValueError(
                "Trainer: among several processes the callback must be called by a transformers Trainer, got none on the stack"
            )
        self.adapter.distribute(trainer.model_wrapped, timeout=trainer.args.ddp_timeout_delta)

    def _go_first(self, callbacks: list) -> None:
        """Reporters come before callbacks that users add: what is to be in a log must be there before them."""
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

    def _watch_losses(self, trainer: Trainer) -> None:
        training_step = trainer.training_step

        @functools.wraps(training_step)
        def watched(*args, **kwargs):
            loss = training_step(*args, **kwargs)
            self._losses.append(loss)
            return loss

        own = vars(trainer).get("training_step")
        trainer.training_step = watched
        if own is None:
            self._training.callback(vars(trainer).pop, "training_step", None)
        else:
            self._training.callback(setattr, trainer, "training_step", own)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self._losses.clear()
        penalty = self.adapter.method.penalty()
        if penalty is not None:
            scaler = getattr(optimizer, "scaler", None)
            # It is the same in all processes, and is averaged with the last micro-batch.
            with self.adapter.no_sync():
                (penalty if scaler is None else scaler.scale(penalty)).backward()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)
        self._scale = None if scaler is None else scaler.get_scale()

    def _was_skipped(self, optimizer) -> bool:
        """Whether gradients overflowed: accelerate cannot tell where a fused optimizer leaves the step out itself; the scale can."""
        if self._scale is None:
            return False
        return optimizer.step_was_skipped or optimizer.scaler.get_scale() < self._scale

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._was_skipped(optimizer):
            return
        try:
            self.adapter.step(self._step_loss())
        except NonFiniteError as error:
            if not self._refused:
                warnings.warn(
                    f"Trainer: step {state.global_step + 1}: {error}. Ranks are left as they are until it is finite again; a lower "
                    "learning rate, max_grad_norm, or a checkpoint from before may help",
                    stacklevel=2,
                )
            self._refused += 1

    def _step_loss(self):
        # What Trainer returns of each micro-batch is its share of the step's loss.
        if self.adapter.method.needs_loss() and self._losses:
            return sum(float(loss) for loss in self._losses)
        return None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return  # of an evaluation, or the summary at the end
        values = log_values(self.adapter, modules=self.log_modules)
        if self._refused:
            values["rank/refused"] = self._refused
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        processes, first = self.adapter.processes, state.is_world_process_zero
        with processes.agreement("Trainer"):
            if first:
                self._save_adapter(folder / ADAPTER_FOLDER)
        trainer_checkpoint.seal(folder, first=first, processes=processes)

    def _save_adapter(self, folder: Path) -> None:
        try:
            self.adapter.save(folder)
        except NonFiniteError as error:
            if not self._unsaved:
                warnings.warn(f"Trainer: no {folder} was written, weights are not finite: {error}", stacklevel=3)
            self._unsaved = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training.close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            file = Path(state.best_model_checkpoint) / "trainer_state.json"
            self._restore(json.loads(file.read_text(encoding="utf-8"))["stateful_callbacks"])
        if self.adapter.method.awaits_clip():
            warnings.warn(
                f"the ranks were not changed in {self.adapter.method.t} steps (phase: {self.adapter.method.phase}); "
                "its steps must end before training does",
                stacklevel=2,
            )

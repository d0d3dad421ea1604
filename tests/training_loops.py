"""The same training by transformers' Trainer and by hand."""

import contextlib

import torch
from models import bert_batch
from transformers import Trainer, TrainingArguments

STEPS = 6


def examples(count):
    data = bert_batch(size=count)
    return [{key: value[i] for key, value in data.items()} for i in range(count)]


def make_trainer(
    adapter, tmp_path, accumulation=1, *, kind=Trainer, callbacks=(), evaluate=False, options=None, **arguments
):
    """A Trainer of `kind` over STEPS batches of 4 with the adapter's callback.  options: of the Trainer.  arguments: TrainingArguments'."""
    defaults = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        disable_tqdm=True,
        **defaults | arguments,
    )
    data = examples(4 * STEPS)
    return kind(
        adapter.model,
        arguments,
        train_dataset=data,
        eval_dataset=data if evaluate else None,
        callbacks=[adapter.callback(), *callbacks],
        **options or {},
    )


def run_trainer(adapter, tmp_path, accumulation=1, *, resume=None, **arguments):
    trainer = make_trainer(adapter, tmp_path, accumulation, **arguments)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def models_loss(model, inputs):
    return model(**inputs).loss


def run_raw(
    adapter,
    accumulation=1,
    *,
    max_grad_norm=0.0,
    task_loss=models_loss,
    context=contextlib.nullcontext,
    scaler=None,
    fused=None,
):
    """
    The same by hand: loss + penalty, differentiated at once. Trainer leaves the mean over micro-batches to models that take
    num_items_in_batch; BERT's classification loss takes and ignores it, so what Trainer trains is the sum of the micro-batches' losses.

    Args: task_loss: of (model, inputs).   context: around the model's forward.   scaler: a GradScaler.   fused: AdamW's.
    """
    adapter.model.train()
    decayed = [p for p in adapter.parameters() if p.dim() > 1]
    others = [p for p in adapter.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-2, fused=fused
    )
    adapter.track(optimizer)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    data = examples(4 * STEPS)
    for step in range(STEPS):
        rows = data[4 * step : 4 * step + 4]
        inputs = {key: torch.stack([row[key] for row in rows]).chunk(accumulation) for key in rows[0]}
        with context():
            loss = sum(
                task_loss(adapter.model, {key: parts[i] for key, parts in inputs.items()}) for i in range(accumulation)
            )
        scaler.scale(loss + adapter.penalty()).backward()
        if max_grad_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), max_grad_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() >= scale:  # it was not skipped
            adapter.step(loss)

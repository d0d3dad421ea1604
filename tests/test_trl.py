"""TRL's SFTTrainer with the callback alone."""

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import adaptlora

STEPS, LENGTH, VOCABULARY = 6, 8, 40


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).double()


def tokenizer():
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    wordlevel = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    wordlevel.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=wordlevel, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (4 * STEPS, LENGTH), generator=generator)


def run_sft(adapter, folder, accumulation):
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.05,
        optim="adamw_torch",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(
        adapter.model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows().tolist()}),
        processing_class=tokenizer(),
        callbacks=[adapter.callback()],
    )
    trainer.train()
    return trainer


def run_raw(adapter):
    """The mean over all tokens of the four texts, whatever the micro-batches."""
    adapter.model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    adapter.track(optimizer)
    for texts in rows().split(4):
        loss = adapter.model(input_ids=texts, labels=texts).loss
        (loss + adapter.penalty()).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(loss)


CONFIGS = {
    "NormAL": adaptlora.NormALConfig(r=4, target_r=2, target_modules="all-linear", t_p=3, t_c=4, eta_p=0.02),
    "NormAL, adaptive": adaptlora.NormALConfig(
        r=4, target_r=2, target_modules="all-linear", min_steps=2, lambda_p=10.0, lambda_c=10.0, eta_p=0.02
    ),
    "La-LoRA": adaptlora.LaLoRAConfig(r=4, target_modules="all-linear", gamma=8.0),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_sft_equals_the_raw_loop(name, accumulation, tmp_path):
    by_sft, by_hand = (adaptlora.attach(model(), CONFIGS[name]) for _ in range(2))
    start = by_hand.ranks()
    trainer = run_sft(by_sft, tmp_path, accumulation)
    run_raw(by_hand)
    assert by_sft.ranks() == by_hand.ranks() != start
    assert (by_sft.method.t, by_sft.method.t_p, by_sft.method.t_c) == (STEPS, by_hand.method.t_p, by_hand.method.t_c)
    for mine, expected in zip(by_sft.parameters(), by_hand.parameters(), strict=True):
        # TRL takes the log-probabilities in float32.
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert last["rank/average"] == sum(by_sft.ranks().values()) / len(by_sft.ranks())


def test_trainer_takes_a_quantised_base(tmp_path):
    """QLoRA's setting: transformers loads the base in 4 bits; the frozen bytes stay as they are, a checkpoint resumes."""
    single = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**single, num_attention_heads=2, pad_token_id=0)).save_pretrained(tmp_path / "base")
    texts = [{"input_ids": row, "labels": row} for row in rows()]

    def make():
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation)
        return adaptlora.attach(base, CONFIGS["NormAL"])

    def train(adapter, resume=None):
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=STEPS,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_steps=2,
            disable_tqdm=True,
        )
        trainer = Trainer(adapter.model, arguments, train_dataset=texts, callbacks=[adapter.callback()])
        trainer.train(resume_from_checkpoint=resume)

    whole, resumed = make(), make()
    packed = whole.layers["model.layers.0.mlp.up_proj"].weight.clone()
    train(whole)
    assert whole.model.is_quantized and whole.method.clipped
    assert torch.equal(whole.layers["model.layers.0.mlp.up_proj"].weight, packed)
    train(resumed, str(tmp_path / "run" / "checkpoint-2"))
    assert all(map(torch.equal, whole.factors(), resumed.factors()))

"""Trainer and SFTTrainer train our adapters: PEFT's losses step by step, checkpoints, resuming, the best one."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer

import inlay
from inlay.errors import UsageError
from test_training import examples
from zoo import make

COLUMNS = ("input_ids", "attention_mask", "labels")


def rows(count=24):
    made = []
    for example in examples(count):
        width = 8
        pad = width - len(example.ids)
        labels = [t if learned else -100 for t, learned in zip(example.ids, example.loss_mask, strict=True)]
        made.append(
            dict(
                zip(
                    COLUMNS,
                    ([*example.ids, *[0] * pad], [1] * len(example.ids) + [0] * pad, labels + [-100] * pad),
                    strict=True,
                )
            )
        )
    return Dataset.from_list(made)


def arguments(folder, **more):
    given = {
        "output_dir": str(folder), "max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "max_grad_norm": 0.3, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 1,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "linear", "weight_decay": 0.1,
    }  # fmt: skip
    return tf.TrainingArguments(**{**given, **more})


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def started_alike(name="llama", dropout=0.0, **more):
    """Our bank and a PEFT model with the same LoRA weights."""
    theirs = peft.get_peft_model(
        make(name),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout),
    ).double()
    bank = inlay.attach(make(name))
    bank.add("it", inlay.LoRA(r=4, alpha=8, targets=["q_proj", "v_proj"], dropout=dropout, **more), seed=0)
    stored = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, own in bank.adapters["it"].params.items():
            for key, parameter in own.items():
                parameter.copy_(stored[f"base_model.model.{path}.lora_{key}.default.weight"])
    return bank, theirs


def ours(bank, folder, out=None, **more):
    trainer = tf.Trainer(model=bank.model, args=arguments(folder, **more), train_dataset=rows(), eval_dataset=rows(6))
    return inlay.InlayCallback(bank, "it", out).install(trainer)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_trainer_has_pefts_losses_with_clipping_and_accumulation(checkpointing, tmp_path):
    bank, theirs = started_alike()
    expected = losses(tf.Trainer(model=theirs, args=arguments(tmp_path / "a"), train_dataset=rows()))
    more = {}
    if checkpointing is not None:
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
        bank.model.enable_input_require_grads()
    found = losses(ours(bank, tmp_path / "b", tmp_path / "adapter", **more))
    assert len(found) == 10 and found == pytest.approx(expected, rel=1e-6)
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "adapter").double().eval()
    ids = torch.tensor([[3, 9, 4, 7]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    bank.model.eval()
    torch.testing.assert_close(bank.model(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_dropout_and_neftune_act_as_with_peft(checkpointing, tmp_path):
    bank, theirs = started_alike(dropout=0.4)
    more = {"neftune_noise_alpha": 5.0}
    if checkpointing is not None:
        more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
        for model in (bank.model, theirs.base_model.model):
            model.enable_input_require_grads()
    expected = losses(tf.Trainer(model=theirs, args=arguments(tmp_path / "a", **more), train_dataset=rows()))
    found = losses(ours(bank, tmp_path / "b", **more))
    assert found == pytest.approx(expected, rel=1e-6)
    without, _ = started_alike()
    assert losses(ours(without, tmp_path / "c", neftune_noise_alpha=5.0)) != pytest.approx(expected, rel=1e-4)


def test_lora_plus_has_its_rates_in_a_trainer(tmp_path):
    bank, theirs = started_alike(loraplus_lr_ratio=16)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    trainer = tf.Trainer(
        model=theirs, args=arguments(tmp_path / "a"), train_dataset=rows(), optimizers=(optimizer, None)
    )
    expected = losses(trainer)
    assert losses(ours(bank, tmp_path / "b")) == pytest.approx(expected, rel=1e-6)
    plain, _ = started_alike()
    assert losses(ours(plain, tmp_path / "c")) != pytest.approx(expected, rel=1e-3)


def test_an_optimizer_without_the_rates_of_lora_plus_is_named(tmp_path):
    bank, _ = started_alike(loraplus_lr_ratio=16)
    with pytest.warns(UserWarning, match="parameter_groups"):
        own = torch.optim.AdamW(list(bank.parameters("it")), lr=1e-2)
    trainer = tf.Trainer(
        model=bank.model, args=arguments(tmp_path, max_steps=1), train_dataset=rows(), optimizers=(own, None)
    )
    inlay.InlayCallback(bank, "it").install(trainer)
    with pytest.warns(UserWarning, match="rates"):
        trainer.train()


def test_evaluate_before_training_scores_the_adapter(tmp_path):
    bank, _ = started_alike()
    with torch.no_grad():
        for parameter in bank.parameters("it"):
            parameter.add_(torch.randn_like(parameter))
    trainer = ours(bank, tmp_path)
    found = trainer.evaluate()["eval_loss"]
    bank.set(None)
    assert abs(found - trainer.evaluate()["eval_loss"]) > 1e-3
    bank.set("it")
    assert trainer.evaluate()["eval_loss"] == found


def test_training_under_the_route_of_another_is_no_training(tmp_path):
    bank, _ = started_alike()
    with bank.route([None]), pytest.raises((UsageError, RuntimeError), match=r"no gradient reached|does not require"):
        ours(bank, tmp_path).train()


@pytest.mark.parametrize("setting", ["fsdp", "deepspeed", "n_gpu"])
def test_a_base_that_would_be_sharded_or_copied_is_refused(setting, tmp_path):
    bank, _ = started_alike()
    args = arguments(tmp_path)
    trainer = tf.Trainer(model=bank.model, args=args, train_dataset=rows())
    if setting == "n_gpu":
        args._n_gpu = 2
    else:
        setattr(args, setting, {"some": 1})
    with pytest.raises(UsageError, match=r"shards|copy the base"):
        inlay.InlayCallback(bank, "it").install(trainer)


@pytest.mark.parametrize(
    "method", [inlay.PrefixTuning(num_virtual_tokens=3, prefix_projection=True), inlay.PromptTuning(), inlay.IA3()]
)
def test_other_methods_train_and_resume_where_they_stopped(method, tmp_path):
    def fresh():
        bank = inlay.attach(make("llama"))
        bank.add("it", method, seed=1)
        return bank

    whole = fresh()
    trainer = ours(whole, tmp_path / "a", learning_rate=0.01)
    whole.set("it")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    first = fresh()
    trainer = ours(first, tmp_path / "b", learning_rate=0.01, save_strategy="steps", save_steps=4)
    trainer.train()
    names = {file.name for file in (tmp_path / "b" / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt"} <= names and "model.safetensors" not in names
    again = fresh()
    resumed = ours(again, tmp_path / "b", learning_rate=0.01, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    for one, other in zip(again.parameters("it"), whole.parameters("it"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_the_best_adapter_is_put_back(tmp_path):
    bank, _ = started_alike()
    more = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5}
    trainer = ours(
        bank, tmp_path, load_best_model_at_end=True, lr_scheduler_type="constant", max_grad_norm=100.0, **more
    )
    trainer.train()
    held = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert min(held, key=held.get) < 10
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(held.values()), rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_trains_lora_padded_and_packed(packing, base_folder, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    data = Dataset.from_list([{"prompt": f"question {n}", "completion": " answer"} for n in range(16)])

    def config(folder):
        return trl.SFTConfig(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, padding_free=packing,
            max_length=None, gradient_checkpointing=False,
        )  # fmt: skip

    def base():
        return tf.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)

    reference = trl.SFTTrainer(
        model=base(), args=config(tmp_path / "a"), train_dataset=data, processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    stored = {n: p.detach().clone() for n, p in reference.model.named_parameters()}
    bank = inlay.attach(base())
    bank.add("it", inlay.LoRA(r=4, alpha=8, targets=["q_proj", "v_proj"]), seed=0)
    with torch.no_grad():
        for path, own in bank.adapters["it"].params.items():
            for key, parameter in own.items():
                parameter.copy_(stored[f"base_model.model.{path}.lora_{key}.default.weight"])
    trainer = trl.SFTTrainer(
        model=bank.model, args=config(tmp_path / "b"), train_dataset=data, processing_class=tokenizer
    )
    inlay.InlayCallback(bank, "it", tmp_path / "adapter").install(trainer)
    assert losses(trainer) == pytest.approx(losses(reference), rel=1e-4)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_packed_rows_have_no_place_for_virtual_tokens():
    bank = inlay.attach(make("llama"))
    bank.add("p", inlay.PromptTuning(num_virtual_tokens=2), seed=0)
    bank.set("p")
    ids, positions = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(UsageError, match="packed rows"):
        bank.model(input_ids=ids, position_ids=positions)
    bank.model(input_ids=ids, position_ids=torch.arange(4)[None])


def test_what_cannot_work_is_said(tmp_path):
    bank, _ = started_alike()
    with pytest.raises(UsageError, match="no adapter is called 'x'"):
        inlay.InlayCallback(bank, "x")
    trainer = tf.Trainer(model=bank.model, args=arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(inlay.InlayCallback(bank, "it"))
    with pytest.raises((UsageError, ValueError), match=r"does not train the adapter|empty parameter list"):
        trainer.train()
    other = tf.Trainer(model=make("llama"), args=arguments(tmp_path), train_dataset=rows())
    with pytest.raises(UsageError, match="not the bank's base"):
        inlay.InlayCallback(bank, "it").install(other)

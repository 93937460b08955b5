"""Two processes train one adapter as one process does with both parts of the batch."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import multiprocessing

import inlay
from inlay.errors import UsageError
from zoo import make

IDS = torch.randint(3, 48, (8, 6), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in IDS.tolist()]


def fresh(seed=0):
    bank = inlay.attach(make("llama"))
    bank.add("it", inlay.LoRA(r=4), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.adapters["it"].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return bank


def trained(folder, rows, batch, seed=0):
    """The adapter after three steps of a Trainer; plain SGD, which shows a gradient's scale."""
    bank = fresh(seed)
    args = tf.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=batch, learning_rate=0.5, optim="sgd",
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=0.3,
        ddp_backend="gloo" if "RANK" in os.environ else None, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = tf.Trainer(model=bank.model, args=args, train_dataset=rows)
    inlay.InlayCallback(bank, "it", folder / "adapter").install(trainer)
    trainer.train()
    return [p.detach().clone() for p in bank.adapters["it"].parameters()]


def gradients(module, bank, rows):
    module(input_ids=rows, labels=rows).loss.backward()
    return [p.grad for p in bank.adapters["it"].parameters()]


def worker(rank, port, folder):
    from pathlib import Path

    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    distributed.init_process_group("gloo")
    bank = fresh()
    module = DistributedDataParallel(inlay.InlayModule(bank, "it"))
    found = {f"ddp {n}": g for n, g in enumerate(gradients(module, bank, IDS[4 * rank : 4 * rank + 4]))}
    # Each process begins with a start of its own: the first one's is everybody's.
    made = trained(Path(folder), ROWS, 2, seed=rank)
    found |= {f"trainer {n}": p for n, p in enumerate(made)}
    save_file(found, Path(folder) / f"{rank}.safetensors")
    distributed.destroy_process_group()


def test_gradients_and_updates_are_those_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(worker, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    bank = fresh()
    expected = {f"ddp {n}": g for n, g in enumerate(gradients(inlay.InlayModule(bank, "it"), bank, IDS))}
    # Batches are dealt to processes in turn: rows 0 and 1 here, rows 2 and 3 there.
    expected |= {f"trainer {n}": p for n, p in enumerate(trained(tmp_path / "one", ROWS, 4))}
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_run_whose_other_processes_nobody_can_find_is_refused(monkeypatch, tmp_path):
    from inlay.runs.run import run
    from inlay.runs.settings import Settings

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"2 processes were started .* RANK, MASTER_ADDR, MASTER_PORT is not set"):
        run(Settings(data=["none.csv"], out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()

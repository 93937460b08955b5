"""AdapterHub's numbers on tiny models, and bases and adapters that hold its weights; golden/make_adapterhub_more.py
made them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import test_bottleneck

GOLDEN = load_file(Path(__file__).parent / "golden" / "adapterhub_more.safetensors")
FAMILIES = ("llama", "gpt2", "bert")
STEPS, RATE = 4, 0.1
BOTTLENECK = {"down": "down.0.weight", "down_bias": "down.0.bias", "up": "up.weight", "up_bias": "up.bias"}


def base_of(name):
    return test_bottleneck.base_of(name, GOLDEN)


def reference(name, kind, key):
    return GOLDEN[f"{name}/{kind}/{key}"]


def copy(parameter, value):
    with torch.no_grad():
        assert parameter.shape == value.shape
        parameter.copy_(value)


def fill_bottlenecks(part, base, name, kind):
    """AdapterHub's weights in a part of parallel adapters."""
    for path, site in part.sites.items():
        block = next(b for b in base.blocks if path.startswith(b + "."))
        if name == "bert":
            place = "output." if site.part == "mlp" else "attention.output."
        else:
            place = "output_" if site.part == "mlp" else "attention_"
        for own, theirs in BOTTLENECK.items():
            key = f"{block}.{place}adapters.adapters.{kind}.adapter_{theirs}"
            if name == "bert":
                key = f"{block}.{place}adapters.{kind}.adapter_{theirs}"
            copy(part.params[path][own], reference(name, kind, key))
        if "scale" in part.params[path]:
            key = key.replace("adapter_up.bias", "scaling")
            copy(part.params[path]["scale"], reference(name, kind, key))


def curve(bank, adapter, inputs):
    """The logits, the losses of a few steps of SGD as the reference made them, and the logits behind those."""
    ids, parameters = inputs["input_ids"], list(bank.parameters(adapter))
    first, losses = None, []
    for _ in range(STEPS):
        out = bank.model(**inputs).logits
        first = out.detach() if first is None else first
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(RATE * grad)
        losses.append(loss.detach())
    return first, torch.stack(losses), bank.model(**inputs).logits.detach()


def same_curve(bank, adapter, name, kind, inputs, bound=1e-9):
    found = curve(bank, adapter, inputs)
    for ours, key in zip(found, ("logits", "losses", "learned"), strict=True):
        torch.testing.assert_close(ours, reference(name, kind, key), rtol=0, atol=bound)


def inputs_of(name):
    ids = GOLDEN[f"{name}/ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

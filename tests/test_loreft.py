"""LoReFT and its kin: parity with AdapterHub where it is right, and the same edits in every form of a batch."""

from __future__ import annotations

import pytest
import torch

import inlay
from adapterhub import FAMILIES, base_of, copy, inputs_of, reference, same_curve
from inlay.errors import UsageError
from inlay.kernels.reflections import orthonormal_rows, reflections_to
from test_laws import acts, gradients, padded, same_gradients
from zoo import make

KINDS = {
    "loreft": lambda: inlay.LoReFT(r=3, prefix_positions=2, suffix_positions=1, dropout=0.0),
    "loreft_tied": lambda: inlay.LoReFT(r=2, prefix_positions=4, suffix_positions=4, tied_weights=True, dropout=0.0),
    "noreft": lambda: inlay.NoReFT(
        r=2, prefix_positions=1, suffix_positions=2, dropout=0.0, non_linearity="relu"
    ),
    "direft": lambda: inlay.DiReFT(r=2, prefix_positions=0, suffix_positions=2, dropout=0.0),
    "loreft_layer": lambda: inlay.LoReFT(r=1, layers=[1], dropout=0.0),
}  # fmt: skip


def fill(adapter, name, kind):
    """AdapterHub's weights; R's reflections begin where its projection is."""
    for path, own in adapter.params.items():
        for unit in adapter.method.units:
            start = f"{path}.reft_layer.refts.{kind}.units.{unit}"
            copy(own["W" + unit], reference(name, kind, f"{start}.learned_source.weight"))
            copy(own["b" + unit], reference(name, kind, f"{start}.learned_source.bias"))
            rows = reference(name, kind, f"{start}.projection.weight")
            if "R" + unit in own:
                copy(own["R" + unit], rows)
            else:
                copy(own["B" + unit], reflections_to(rows))
                copy(own["A" + unit], torch.zeros_like(rows))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_it_gives_and_learns_what_adapterhub_does(name, kind):
    bank = inlay.attach(base_of(name))
    fill(bank.add("a", KINDS[kind](), seed=0), name, kind)
    bank.set("a")
    same_curve(bank, "a", name, kind, inputs_of(name))


@pytest.mark.parametrize("r", [1, 4])
def test_rows_start_where_they_should_and_stay_orthonormal(r):
    bank = inlay.attach(make("llama"))
    adapter = bank.add("a", inlay.LoReFT(r=r), seed=1)
    own = next(iter(adapter.params.values()))
    first = orthonormal_rows(own["A0"], own["B0"]).detach()
    optimizer = torch.optim.AdamW(bank.parameters("a"), lr=0.1, weight_decay=0.1)
    bank.set("a")
    for _ in range(5):
        bank.model(input_ids=torch.arange(3, 9)[None]).logits.square().mean().backward()
        optimizer.step()
    rows = orthonormal_rows(own["A0"], own["B0"]).detach()
    assert float((rows - first).abs().max()) > 0.05
    torch.testing.assert_close(rows @ rows.T, torch.eye(r, dtype=rows.dtype), rtol=0, atol=1e-12)
    assert not own["B0"].requires_grad and own["B0"].grad is None


def test_rows_are_orthonormal_over_a_base_of_few_bits():
    bank = inlay.attach(make("llama", dtype=torch.bfloat16))
    adapter = bank.add("a", inlay.LoReFT(r=4), seed=1)
    path = next(iter(adapter.sites))
    rows = adapter.parts[0].at(path, torch.bfloat16, {})["R0"]
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float() @ rows.float().T, torch.eye(4), rtol=0, atol=0.01)


# ---- the same edits in every form of a batch

WISHES = {
    "loreft": lambda: inlay.LoReFT(r=2, prefix_positions=2, suffix_positions=1),
    "tied": lambda: inlay.LoReFT(r=1, prefix_positions=1, suffix_positions=2, tied_weights=True),
    "noreft": lambda: inlay.NoReFT(suffix_positions=3),
    "direft": lambda: inlay.DiReFT(r=3, layers=[1]),
    "lora": lambda: inlay.LoRA(r=4),
    "prompt": lambda: inlay.PromptTuning(num_virtual_tokens=3, init="vocab"),
    "both": lambda: [inlay.LoReFT(r=2, suffix_positions=1), inlay.LoRA(r=2), inlay.PrefixTuning(num_virtual_tokens=2)],
}
ROWS = [
    None, *WISHES, ["loreft", "lora"], ["loreft", "noreft"], {"loreft": 0.5, "direft": 2.0}, ["prompt", "loreft"],
]  # fmt: skip
PROMPTS = [2 + i % 3 for i in range(len(ROWS))]


def bank_of(name):
    bank = inlay.attach(make(name))
    for wish, method in WISHES.items():
        bank.add(wish, method(), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return bank


def pieces():
    torch.manual_seed(1)
    return [torch.randint(3, 48, (1, n + 1 + i % 2)) for i, n in enumerate(PROMPTS)]


@pytest.mark.parametrize("form", ["right", "left", "packed"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_rows_of_every_form_are_those_of_the_row_alone(name, form):
    bank, own = bank_of(name), pieces()
    parameters = list(bank.parameters())
    if form == "packed":
        segments = [(row, piece.shape[1]) for row, piece in zip(ROWS, own, strict=True)]
        with bank.stream(segments, prompts=PROMPTS):
            whole = bank.model(input_ids=torch.cat(own, 1)).logits[0]
        found = [part[None] for part in whole.split([piece.shape[1] for piece in own])]
    else:
        ids, mask = padded(own, form)
        with bank.route(ROWS, prompts=PROMPTS):
            whole = bank.model(input_ids=ids, attention_mask=mask).logits
        sizes = [piece.shape[1] for piece in own]
        found = [row[None, -n:] if form == "left" else row[None, :n] for row, n in zip(whole, sizes, strict=True)]
    totals, loss = None, 0.0
    for row, prompt, piece, ours in zip(ROWS, PROMPTS, own, found, strict=True):
        if row is None and form == "left" and name in ("gpt2", "bert"):
            continue  # a base's own positions count the padding
        if form == "left" and name in ("gpt2", "bert") and "prompt" not in str(row) and row != "both":
            continue
        with bank.route([row], prompts=[prompt]):
            alone = bank.model(input_ids=piece).logits
        acts(bank, name, row, alone, bank.model(input_ids=piece).logits if row is None else plain(bank, piece))
        # Rotary embeddings are computed in float32: positions that count the padding change the last digits.
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-6 if form == "left" else 1e-9)
        if alone.requires_grad:
            grads = gradients(alone.square().sum(), parameters)
            totals = grads if totals is None else [a + b for a, b in zip(totals, grads, strict=True)]
            loss = loss + ours.square().sum()
    found = gradients(loss, parameters)
    if form != "left":
        return same_gradients(found, totals)
    for ours, expected in zip(found, totals, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def plain(bank, piece):
    with bank.route([None]):
        return bank.model(input_ids=piece).logits


def test_tokens_behind_the_prompt_are_left_alone():
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.DiReFT(prefix_positions=3, suffix_positions=2, layers=[1]), seed=1)
    ids = torch.arange(3, 12)[None]
    base = bank.model(input_ids=ids, output_hidden_states=True).logits
    for prompt in (2, 4, 9):
        with bank.route(["a"], prompts=[prompt]):
            out = bank.model(input_ids=ids).logits
        changed = (out - base).abs().amax(-1)[0] > 1e-9
        expected = [i < min(3, prompt) or prompt - 2 <= i < prompt for i in range(9)]
        assert changed.tolist() == expected  # behind the last block, an edit reaches its own token alone


@pytest.mark.parametrize("side", ["none", "left"])
def test_decoded_rows_are_those_without_a_cache(side):
    bank = inlay.attach(make("llama"))
    for wish in ("loreft", "noreft", "tied"):
        bank.add(wish, WISHES[wish](), seed=1)
    rows = ["loreft", None, "noreft", "tied"]
    sizes = [5, 5, 5, 5] if side == "none" else [3, 5, 4, 2]
    prompts = [torch.randint(3, 48, (1, n)) for n in sizes]
    ids, mask = padded(prompts, "left")
    with bank.route(rows):
        out = bank.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )[:, -6:]
    for row, prompt, said in zip(rows, prompts, out, strict=True):
        tokens = prompt
        for expected in said:
            with bank.route([row], prompts=[prompt.shape[1]]):
                following = bank.model(input_ids=tokens).logits[0, -1].argmax()
            assert following == expected
            tokens = torch.cat([tokens, expected.view(1, 1)], 1)


def test_images_have_positions_too():
    bank = inlay.attach(make("vit"))
    bank.add("a", inlay.NoReFT(prefix_positions=1, suffix_positions=2), seed=1)
    bank.add("b", inlay.LoReFT(prefix_positions=0, suffix_positions=5, r=2), seed=2)
    images, rows = torch.randn(3, 3, 8, 8, dtype=torch.float64), ["a", None, "b"]
    with bank.route(rows):
        together = bank.model(pixel_values=images).logits
    plain = bank.model(pixel_values=images).logits
    for row, image, ours, base in zip(rows, images, together, plain, strict=True):
        with bank.route([row]):
            alone = bank.model(pixel_values=image[None]).logits[0]
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-9)
        assert row is None or not torch.allclose(ours, base, atol=1e-4)


def test_blocks_whose_tokens_are_not_the_rows_are_refused_by_name():
    """Longformer pads its rows to whole windows. (A tower's tokens have positions of their own.)"""
    bank = inlay.attach(make("longformer"))
    bank.add("a", inlay.NoReFT(), seed=1)
    ids = torch.randint(3, 40, (2, 6))
    with bank.route(["a", None]), pytest.raises(UsageError, match=r"encoder.* no position can be told"):
        bank.model(input_ids=ids)


def test_settings_that_edit_nothing_or_too_much_are_refused():
    bank = inlay.attach(make("llama"))
    with pytest.raises(UsageError, match="no position"):
        bank.add("a", inlay.LoReFT(prefix_positions=0))
    with pytest.raises(UsageError, match="r is 16"):
        bank.add("a", inlay.LoReFT(r=16))
    with pytest.raises(UsageError, match="cannot be merged"):
        bank.add("a", inlay.LoReFT(), seed=1)
        bank.merge("a")

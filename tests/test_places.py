"""Virtual tokens stand where they are put, in every call form, and hand their state on to what follows."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.errors import UsageError
from zoo import make

COUNT = 3
IDS = torch.tensor([[5, 9, 22, 31, 7, 13, 40]])


def bank_of(name):
    bank = inlay.attach(make(name))
    bank.add("p", inlay.PromptTuning(num_virtual_tokens=COUNT), seed=1)
    return bank


def by_hand(bank, place):
    """Embeddings with the virtual tokens in place, and what each real token hands on."""
    embedded = bank.model.get_input_embeddings()(IDS)
    virtual = next(bank.parameters("p")).detach().to(embedded.dtype)[None]
    wide = torch.cat([embedded[:, :place], virtual, embedded[:, place:]], 1)
    kept = [n for n in range(wide.shape[1]) if not place <= n < place + COUNT]
    if place and bank.model.can_generate():
        kept[place - 1] = place + COUNT - 1
    return wide, kept


def states(out):
    return out.logits if hasattr(out, "logits") else out[0]


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_any_place_equals_embeddings_put_there_by_hand(name, place):
    bank = bank_of(name)
    wide, kept = by_hand(bank, place)
    expected = states(bank.model(inputs_embeds=wide))[:, kept]
    with bank.route(["p"], places=[place]):
        torch.testing.assert_close(states(bank.model(input_ids=IDS)), expected)
    padded = torch.ones(3, 9, dtype=torch.long)
    mask = torch.ones_like(padded)
    padded[0, 2:], padded[1, :7], padded[2, 1:8] = IDS[0], IDS[0], IDS[0]
    mask[0, :2], mask[1, 7:], mask[2, [0, 8]] = 0, 0, 0
    with bank.route(["p", "p", None], places=[place, place, 0]):
        out = states(bank.model(input_ids=padded, attention_mask=mask))
    torch.testing.assert_close(out[0, 2:], expected[0])
    torch.testing.assert_close(out[1, :7], expected[0])
    if bank.packs:
        with bank.stream([("p", 7), (None, 7)], places=[place, 0]):
            torch.testing.assert_close(states(bank.model(input_ids=IDS.repeat(1, 2)))[0, :7], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("place", [3, 7])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_goes_on_behind_them(name, place):
    bank = bank_of(name)
    wide, _ = by_hand(bank, place)
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = bank.model.generate(
        inputs_embeds=wide, attention_mask=torch.ones(wide.shape[:2], dtype=torch.long), **told
    )
    with bank.route(["p"], places=[place]):
        written = bank.model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **told)
    assert written[0, 7:].tolist() == expected[0].tolist()


def test_a_place_outside_of_the_row_is_refused():
    bank = bank_of("llama")
    with pytest.raises(UsageError, match="outside"), bank.route(["p"], places=[8]):
        bank.model(input_ids=IDS)
    with pytest.raises(UsageError, match="outside"), bank.stream([("p", 7)], places=[-1]):
        bank.model(input_ids=IDS)
    with pytest.raises(UsageError), bank.route(["p"], places=[0, 0]):
        pass

"""How a base numbers positions is seen, not guessed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.sites.backbone import describe, observe_positions
from inlay.sites.structure import find
from zoo import MORE, ZOO, make

RULES = {
    "opt": ("mask", 0, None), "roberta": ("ids", 1, 0), "roberta_classifier": ("ids", 2, 1), "mpnet": ("ids", 2, 1),
    "longformer": ("ids", 2, 1), "yoso": ("columns", 2, None),
}  # fmt: skip
"""(counts, first, padding) of the bases that count otherwise than by columns from 0."""


@pytest.mark.parametrize("name", [*ZOO, *MORE])
def test_the_rule_of_positions(name):
    for backbone in find(make(name, dtype=torch.float32)).backbones:
        assert (backbone.counts, backbone.first, backbone.padding) == RULES.get(name, ("columns", 0, None))
        assert backbone.filler not in (backbone.padding, getattr(backbone.module.config, "pad_token_id", None))


def test_biogpt_counts_columns_although_its_table_takes_a_mask():
    (backbone,) = find(make("biogpt")).backbones
    assert describe(backbone.module, "").counts == "mask" and backbone.counts == "columns"


def test_a_padding_id_that_the_configuration_does_not_know_is_found():
    model = make("mpnet")
    model.config.pad_token_id = 500
    (backbone,) = find(model).backbones
    assert (backbone.counts, backbone.first, backbone.padding) == ("ids", 2, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "roberta", "mpnet", "longformer", "biogpt"])
def test_plain_positions_are_the_bases_own(name):
    """Positions given by the rule change nothing for real tokens, under left padding too."""
    model = make(name)
    (backbone,) = find(model).backbones
    padding = model.config.pad_token_id or 0
    for pads in (0, 2):
        ids = torch.tensor([[padding] * pads + [9, 7, 5, 8]])
        mask = torch.ones_like(ids)
        mask[:, :pads] = 0
        positions = backbone.plain_positions(ids, mask, 0)
        plain = backbone.module(input_ids=ids, attention_mask=mask)[0]
        given = backbone.module(input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0))[0]
        torch.testing.assert_close(given[:, pads:], plain[:, pads:], rtol=1e-9, atol=1e-9)


def test_a_backbone_that_cannot_be_run_is_described_by_its_structure():
    class Odd(nn.Module):
        def get_input_embeddings(self):
            raise NotImplementedError

        def forward(self, input_ids, position_ids=None):
            raise ValueError

    odd = Odd()
    odd.register_parameter("weight", nn.Parameter(torch.ones(2)))
    backbone = observe_positions(odd, "")
    assert (backbone.counts, backbone.first, backbone.embedding) == ("columns", 0, None)

"""Sites are found by structure on every architecture of the zoo."""

from __future__ import annotations

import pytest

from inlay.errors import UsageError
from inlay.sites.structure import find
from inlay.sites.targets import parse_layers, select_projections
from zoo import ZOO, make

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi3": {"qkv_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "bloom": {"query_key_value", "dense"},
    "bert": {"query", "key", "value", "dense"},
    "t5": {"q", "k", "v", "o"},
}
MLP = {
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "phi3": {"gate_up_proj", "down_proj"},
    "gpt2": {"c_fc", "c_proj"},
    "opt": {"fc1", "fc2"},
    "bert": {"dense"},
    "t5": {"wi", "wo"},
}
SUBLAYERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "qwen3_moe": ["self_attn.o_proj", "mlp"],
    "bert": ["attention.output.dense", "output.dense"],
}


@pytest.fixture(scope="module", params=list(ZOO))
def named(request):
    return request.param, find(make(request.param))


def test_blocks_are_counted(named):
    name, base = named
    assert base.layers == (4 if name == "t5" else 2)
    assert len(base.stacks) == (2 if name == "t5" else 1)


def test_groups_name_the_projections(named):
    name, base = named
    for group, table in (("attention", ATTENTION), ("mlp", MLP)):
        if name in table:
            assert {s.name for s in select_projections(base, group)} == table[name]


def test_all_linear_is_every_projection_of_the_blocks(named):
    _, base = named
    sites = select_projections(base, "all-linear")
    assert sites and all(s.layer is not None for s in sites)
    assert not any("lm_head" in s.path or "classifier" in s.path for s in sites)


def test_weights_have_the_sizes_the_site_says(named):
    _, base = named
    for site in base.projections:
        assert site.weight().shape == (site.out_features, site.in_features), site.path


def test_each_block_has_its_sublayers(named):
    name, base = named
    if name in SUBLAYERS:
        first = [s for s in base.sublayers if s.layer == 0]
        assert [next(s.path for s in first if s.path.endswith(tail)) for tail in SUBLAYERS[name]]
        assert len(first) == 2
    assert all((s.norm is not None) == (name in ("bert", "roberta")) for s in base.sublayers)


def test_cross_attention_is_told_apart():
    base = find(make("t5"))
    assert {s.path.split(".")[0] for s in base.projections if s.part == "cross-attention"} == {"decoder"}
    assert sum(s.part == "cross-attention" for s in base.projections) == 8


def test_names_regexes_lists_and_layers():
    base = find(make("llama"))
    assert [s.path for s in select_projections(base, ["q_proj"], layers="last 1")] == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert len(select_projections(base, r".*\.1\..*_proj")) == 7
    assert {s.name for s in select_projections(base, ["qv", "down_proj"])} == {"q_proj", "v_proj", "down_proj"}
    assert {s.name for s in select_projections(find(make("gpt2")), "qv")} == {"c_attn"}
    assert parse_layers("0,2-3", 5) == {0, 2, 3}
    assert parse_layers([-1], 5) == {4}


@pytest.mark.parametrize("targets", ["q_prj", ["q_proj", "nothing"], "("])
def test_a_target_that_matches_nothing_lists_candidates(targets):
    with pytest.raises(UsageError, match="q_proj"):
        select_projections(find(make("llama")), targets)


@pytest.mark.parametrize("layers", ["9", "last", "x-y", [7]])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(UsageError):
        select_projections(find(make("llama")), "all-linear", layers)

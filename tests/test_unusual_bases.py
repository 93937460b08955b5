"""Bases that differ from most in one trait: each is right, or refused by a sentence that names the trait."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from sweep.bases import Base
from sweep.case import Case
from sweep.laws import cells_of
from sweep.verdicts import BaseFails
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import inlay
from inlay.errors import UsageError
from zoo import make


@pytest.mark.parametrize(
    ("name", "method", "laws"),
    [
        ("causal:bart", "prefix", ("mixed", "generate")),  # a wrapper whose forward nobody calls
        ("vision-text:florence2", "prefix", ("mixed",)),  # an encoder and a decoder inside of a whole model of text
        ("vision-text:florence2", "prompt", ("mixed",)),
        ("vision-text:qwen3_vl", "prompt", ("mixed", "media")),  # the backbone is told which tokens are images'
        ("vision-text:fuyu", "prefix", ("mixed",)),  # the model around gives the positions of columns
        ("causal:openai-gpt", "loreft", ("mixed",)),  # blocks that give a list
        ("causal:deepseek_v4", "lora", ("mixed", "merge")),  # a linear layer of groups
        ("classify:lilt", "prompt", ("mixed",)),  # places on a page beside the ids
        ("masked:esm", "head", ("reload",)),  # a head of several modules, one inside of another
        ("causal:dory", "head", ("mixed",)),  # a head that gives another dtype than its weights'
        ("vision-text:inkling2", "houlsby", ("mixed", "merge")),  # towers and text of widths of their own
        ("causal:falcon_mamba", "lora", ("mixed",)),  # norms without parameters
        ("classify:perceiver", "lora", ("mixed",)),  # what embeds the input is no module
    ],
)
def test_what_is_unusual_is_right(name, method, laws):
    use, kind = name.split(":")
    check_known(kind)
    cells = [cell for cell in cells_of(use, kind, [method], laws) if cell.law != "build"]
    expected = {(law, "refused" if (law, method) == ("merge", "houlsby") else "right") for law in laws}
    assert {(cell.law, cell.status) for cell in cells} == expected, cells


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("speech:speecht5", "prefix", "DecoderWithTextPrenet takes no input_ids"),
        ("masked:xlm", "prefix", "does not read keys and values before several tokens in its cache"),
        ("seq2seq:prophetnet", "prefix", "does not read keys and values before several tokens in its cache"),
        ("classify:t5gemma2", "prefix", "MergedAttention makes masks of its own"),
        ("classify:albert", "prompt", "pools the first column, which is padding"),
        ("causal:deepseek_v4", "prompt", "does not ignore padding"),  # it compresses windows, counted from column 0
        ("vision-text:git", "prompt", "makes 26 states of 9 tokens"),
        ("causal:xlnet", "prompt", "embeds .* rows and tokens as"),
        ("sound:wav2vec2-bert", "prefix", "makes biases of its own|takes no keys and values from outside"),
    ],
)
def test_what_cannot_be_is_refused_by_what_the_base_does(name, method, said):
    use, kind = name.split(":")
    cells = list(cells_of(use, kind, [method], ["mixed"]))
    assert [cell.status for cell in cells] == ["right", "refused"]
    with pytest.raises(UsageError, match=said):
        raise UsageError(cells[1].note, "")


def check_known(name: str) -> None:
    """The oldest transformers that is allowed lacks some."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def built(use: str, name: str) -> Any:
    check_known(name)
    base = Base(use, name)
    _ = base.maker
    return base.make()


def test_a_single_token_that_reads_masked_keys_refuses_unequal_prefixes():
    cells = list(cells_of("seq2seq", "led", ["prefix"], ["attach", "generate"]))
    assert [cell.status for cell in cells] == ["right", "right", "refused"]
    assert "a single token of this base reads what is masked in the cache" in cells[2].note


def test_the_sentences_of_refusals_are_true():
    decoder = built("speech", "speecht5").get_decoder()
    assert "input_ids" not in inspect.signature(decoder.forward).parameters
    with pytest.raises(AssertionError):  # columns of a cache beside those of the tokens
        built("masked", "xlm")(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 5))
    xlnet, seen = built("causal", "xlnet"), []
    xlnet.transformer.word_embedding.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
    xlnet(input_ids=torch.randint(3, 48, (2, 5)))
    assert seen == [(5, 2)]  # tokens before rows
    attention = built("sound", "wav2vec2-bert").wav2vec2_bert.encoder.layers[0].self_attn
    assert attention.position_embeddings_type and not hasattr(attention, "compute_bias")


@pytest.mark.parametrize("name", ["inkling2_text", "deepseek_v32"])
def test_a_base_with_biases_or_masks_of_its_own_does_not_pack(name):
    bank = inlay.attach(built("causal", name))
    assert not bank.packs
    with pytest.raises(UsageError, match="cannot keep packed segments apart"):
        bank.stream([(None, 3)])


def test_every_sublayer_has_the_width_of_its_own_stream():
    structure = inlay.attach(built("vision-text", "inkling2")).base
    widths = {site.path: site.out_features for site in structure.sublayers}
    seen = {
        p: call.output_shape[-1] for p, call in structure.observed.calls.items() if p in widths and call.output_shape
    }
    assert len(seen) == 4 and all(widths[path] == width for path, width in seen.items()) and all(widths.values())


def test_a_table_that_others_stand_for_is_no_target():
    bank = inlay.attach(make("t5"))
    assert "shared" in bank.base.observed.silent(["shared"])
    with pytest.raises(
        UsageError, match=r"shared, which is not called: encoder.embed_tokens, decoder.embed_tokens look"
    ):
        bank.add("table", inlay.LoRA(targets=["shared"]))
    sites = bank.add("table", inlay.LoRA(targets=["embed_tokens"])).parts[0].sites
    assert list(sites) == ["encoder.embed_tokens", "decoder.embed_tokens"]


def test_a_head_with_one_parameter_twice_is_taken_in_parts():
    bank = inlay.attach(make("bert"))
    sites = bank.add("head", inlay.ModulesToSave()).parts[0].sites
    assert list(sites) == ["cls.predictions.transform", "cls.predictions.decoder"]
    ids = torch.randint(3, 48, (2, 5))
    with torch.no_grad():
        plain = bank.model(input_ids=ids).logits
        for parameter in bank.parameters("head"):
            parameter.add_(0.1)
        with bank.route(["head", None]):
            routed = bank.model(input_ids=ids).logits
    assert torch.equal(routed[1], plain[1]) and not torch.allclose(routed[0], plain[0])


def test_a_base_that_scales_by_ties_is_not_untied():
    base = Base("seq2seq", "switch_transformers")
    bank = inlay.attach(base.make())
    bank.add("head", inlay.LoRA(targets=["lm_head"]))
    with torch.no_grad():
        for parameter in bank.parameters("head"):
            parameter.add_(0.1)
    ids = torch.randint(3, 48, (1, 5))
    plain = base.make()(input_ids=ids, decoder_input_ids=ids).logits
    with pytest.raises(UsageError, match="scales its last states where its tables are tied"):
        bank.merge("head")
    config: Any = bank.model.config
    assert config.tie_word_embeddings and "head" in bank.adapters
    bank.detach()
    assert torch.equal(bank.model(input_ids=ids, decoder_input_ids=ids).logits, plain)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ["q_proj"]}, "norm targets .'q_proj'. match no norm"),
        ({"layers": []}, "layers .. hold none of the norms"),
    ],
)
def test_norm_tuning_says_what_matches_nothing(settings, said):
    with pytest.raises(UsageError, match=said):
        inlay.attach(make("llama")).add("norm", inlay.NormTuning(**settings))


def test_a_base_whose_tokens_read_nothing_is_told():
    case = Case(Base("masked", "mra"))
    fault = case.reads_nothing(case.base.batch(case.base.rows(1)))
    assert isinstance(fault, BaseFails) and "no token of the plain base reads another" in str(fault)
    case = Case(Base("causal", "llama"))
    assert case.reads_nothing(case.base.batch(case.base.rows(1))) is None

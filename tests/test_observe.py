"""What one tiny forward shows of a base, on the zoo and on families that stand for one trait each."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from inlay.errors import UsageError
from inlay.sites.attention import HANDLER
from inlay.sites.observe import attention_sites, first_tensor, uses_interface
from inlay.sites.structure import find
from inlay.sites.targets import select_projections
from inlay.sites.tiny import run_tiny
from zoo import MORE, ZOO, make

FLOAT32_ONLY = {"xglm"}
"""Bases that cannot be run in float64."""
PRE_NORM = {
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "gemma3": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "pre_feedforward_layernorm"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    "gpt_neox": {"attention.dense": "input_layernorm", "mlp.dense_4h_to_h": "post_attention_layernorm"},
    "opt": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    "bloom": {"self_attention.dense": "input_layernorm", "mlp.dense_4h_to_h": "post_attention_layernorm"},
    "qwen3_moe": {"self_attn.o_proj": "input_layernorm", "mlp": "post_attention_layernorm"},
    "bert": {"attention.output.dense": "attention.self.query", "output.dense": "intermediate.dense"},
    "bart": {"self_attn.out_proj": "self_attn.q_proj", "encoder_attn.out_proj": "encoder_attn.q_proj", "fc2": "fc1"},
    "longformer": {"attention.output.dense": "", "output.dense": "intermediate.dense"},
    "vit": {"attention.o_proj": "layernorm_before", "mlp.fc2": "layernorm_after"},
    "whisper": {
        "self_attn.out_proj": "self_attn_layer_norm", "encoder_attn.out_proj": "encoder_attn_layer_norm",
        "fc2": "final_layer_norm",
    },
}  # fmt: skip
"""Below a block, each sublayer and the module that reads the stream its output is added to; "" is the block."""


def base_of(name: str) -> Any:
    return find(make(name, dtype=torch.float32 if name in FLOAT32_ONLY else torch.float64))


@pytest.fixture(scope="module", params=[*ZOO, *MORE])
def seen(request):
    return request.param, base_of(request.param)


def test_every_family_can_be_run(seen):
    _, base = seen
    observed = base.observed
    assert observed.ran and observed.why == ""
    assert {site.path for site in base.sublayers if site.path in observed.calls} == set(observed.streams)
    assert base.observed is observed


def test_nothing_stays_on_the_model(seen):
    name, _ = seen
    base = base_of(name)
    base.model.train()
    first = next(base.model.children())
    first.eval()
    flags = [module.training for module in base.model.modules()]
    held = [set(vars(module)) for module in base.model.modules()]
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    states = torch.random.get_rng_state(), random.getstate()
    assert base.observed.ran and base.backbones
    assert [module.training for module in base.model.modules()] == flags
    assert [set(vars(module)) for module in base.model.modules()] == held
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())
    base.model.eval()
    if name != "rwkv":  # whose own forward rescales weights where the mode has changed
        assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert HANDLER.get() is None


def test_streams_are_what_outputs_are_added_to(seen):
    name, base = seen
    paths = {module: path for path, module in base.model.named_modules()}
    if name not in PRE_NORM:
        return
    blocks = {path: block for path in base.observed.streams for block in base.blocks if path.startswith(block + ".")}
    for path, module in base.observed.streams.items():
        block = blocks[path]
        want = PRE_NORM[name][path.removeprefix(block + ".")]
        assert paths[module] == (f"{block}.{want}" if want else block)


def test_llamas_groups_of_readers():
    base = base_of("llama")
    groups = set(base.observed.same_input.values())
    ends = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
    assert groups == {tuple(f"model.layers.{i}.{e}" for e in end) for i in range(2) for end in ends}
    assert all(path in group for path, group in base.observed.same_input.items())


def test_cross_attention_reads_another_input_than_its_queries():
    same = base_of("bart").observed.same_input
    block = "model.decoder.layers.0.encoder_attn"
    assert same[f"{block}.k_proj"] == (f"{block}.k_proj", f"{block}.v_proj")
    assert f"{block}.q_proj" not in same


def test_readers_of_a_changed_tensor_are_no_group():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            total = self.a(x) + self.b(x)
            x.mul_(2)
            return total + self.c(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, input_values):
            for layer in self.layers:
                input_values = layer(input_values)
            return input_values

        dummy_inputs = {"input_values": torch.ones(1, 2, 4)}  # noqa: RUF012

    base = find(Model())
    assert base.observed.ran, base.observed.why
    assert base.observed.same_input["layers.1.a"] == ("layers.1.a", "layers.1.b")
    assert "layers.1.c" not in base.observed.same_input


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "biogpt", "xglm", "bart", "pegasus", "llama", "gpt2"])
def test_table_scale_is_the_factor_of_the_references_product(name):
    base: Any = find(make(name, dtype=torch.float32))
    table = base.model.get_input_embeddings()
    site = next(s for s in base.embeddings if s.module is table)
    ids = torch.tensor([[3, 5]])
    before = table(ids)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=[site.name], init_lora_weights=False)
    wrapped: Any = get_peft_model(base.model, config)
    wrapped = wrapped.base_model.model.get_submodule(site.path)
    product = wrapped.lora_embedding_B["default"] @ wrapped.lora_embedding_A["default"]
    torch.testing.assert_close(wrapped(ids) - before, product.t()[ids] * site.table_scale, rtol=1e-4, atol=1e-5)
    assert site.table_scale == (1.0 if name in ("pegasus", "llama", "gpt2") else 4.0)


def test_tables_that_look_up_other_rows_than_their_ids_are_refused():
    base = base_of("opt")
    assert "embed_positions" not in {s.name for s in base.embeddings}
    with pytest.raises(UsageError, match=r"embed_positions, which gives something else than the rows of its ids"):
        select_projections(base, ["embed_positions"])


def test_norm_offsets(seen):
    name, base = seen
    offsets = set(base.observed.norm_offset.values())
    assert offsets == ({1.0} if "gemma" in name or name == "nemotron" else {0.0})
    assert {s.offset for s in base.norms} == offsets


def test_norms_that_take_a_gate_or_count_channels_are_none():
    assert not any("mixer" in s.path for s in base_of("mamba2").norms)
    assert len(base_of("mamba2").norms) == 3
    assert not any("feature_extractor" in s.path for s in base_of("wav2vec2").norms)


def test_weights_that_are_read_without_a_call_are_left_out():
    mamba, siglip = base_of("mamba"), base_of("siglip")
    assert "dt_proj" not in {s.name for s in select_projections(mamba, "all-linear")}
    with pytest.raises(UsageError, match=r"dt_proj, which is not called: the base reads its weight"):
        select_projections(mamba, ["in_proj", "dt_proj"])
    assert set(siglip.observed.unusable) == {"head.attention.out_proj"}


def test_towers_are_seen_beside_the_text():
    base = base_of("llava")
    tower = [s.path for s in base.projections if "vision_tower" in s.path]
    assert base.observed.silent(tower) == [] and not base.observed.unusable
    assert {s.path for s in select_projections(base, "all-linear")} >= set(tower)
    assert base.observed.other_input >= set(tower)
    assert not any("vision_tower" in path for path in (s.path for s in attention_sites(base)))


def test_what_a_forward_did_not_reach_is_kept():
    experts = find(make("mixtral"))
    assert experts.observed.ran and not experts.observed.unusable


def test_a_router_whose_weight_is_read_is_no_linear_site():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up = nn.Linear(4, 2), nn.Linear(4, 4)
            self.pair = Pair(4, 4)

        def forward(self, x):
            gate = (x @ self.router.weight.T).softmax(-1)
            return self.up(x) * gate[..., :1] + self.pair(x)[0]

    class Pair(nn.Linear):
        def forward(self, x):  # pyright: ignore
            return super().forward(x), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, inputs):
            for layer in self.layers:
                inputs = layer(inputs)
            return inputs

        dummy_inputs = {"inputs": torch.ones(1, 2, 4)}  # noqa: RUF012

    base = find(Model())
    assert base.observed.unusable["layers.0.router"] == "is not called: the base reads its weight"
    assert base.observed.unusable["layers.0.pair"] == "gives a tuple instead of a tensor"
    assert {s.name for s in select_projections(base, "all-linear")} == {"up"}


def test_a_weight_that_is_read_but_not_multiplied_is_usable():
    base = base_of("rwkv")
    assert base.observed.ran and not base.observed.unusable


def test_a_parts_end_is_what_is_called_last_whatever_is_registered_last():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj, self.o_proj, self.gate_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.o_proj(self.v_proj(x) * self.gate_proj(x).sigmoid())

    class Block(nn.Module):
        def __init__(self, summed: bool) -> None:
            super().__init__()
            self.summed, self.attn = summed, Attention()
            self.down, self.early = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.attn(x)
            early = self.early(x)
            return x + self.down(early) if self.summed else x + 2 * self.down(early)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(True), Block(False)])

        def forward(self, inputs):
            for layer in self.layers:
                inputs = layer(inputs)
            return inputs

        dummy_inputs = {"inputs": torch.randn(1, 2, 4)}  # noqa: RUF012

    base = find(Model())
    ends = [f"layers.{i}.{end}" for i in range(2) for end in ("attn.o_proj", "down")]
    assert [s.path for s in base.sublayers] == ends
    paths = {module: path for path, module in base.model.named_modules()}
    assert paths[base.observed.streams["layers.0.attn.o_proj"]] == "layers.0.attn.v_proj"
    assert paths[base.observed.streams["layers.0.down"]] == "layers.0.early"


def test_block_sites_have_the_streams_width(seen):
    name, base = seen
    sites = {s.path: s for s in base.block_sites}
    assert set(sites) == set(base.blocks) and all(s.kind == "block" for s in sites.values())
    assert {s.in_features for s in sites.values()} == {16}, name


@pytest.mark.parametrize(
    ("name", "path", "sizes"),
    [
        ("llama", "lm_head", (16, 48)), ("bert", "cls", (16, 48)), ("roberta_classifier", "classifier", (16, 2)),
        ("mpnet", "classifier", (16, 2)), ("vit", "classifier", (16, 3)), ("t5", "lm_head", (16, 48)),
        ("bart_classifier", "classification_head", (16, 3)), ("biogpt", "output_projection", (16, 48)),
        ("whisper", "proj_out", (16, 48)), ("wav2vec2", "lm_head", (16, 48)), ("llava", "lm_head", (16, 48)),
    ],
)  # fmt: skip
def test_heads_are_whole_modules_behind_the_last_block(name, path, sizes):
    (head,) = base_of(name).heads
    assert (head.path, head.kind, head.in_features, head.out_features) == (path, "head", *sizes)


def test_attention_is_seen_with_the_shapes_of_its_keys():
    base = base_of("llama")
    assert uses_interface(base)
    assert [(s.heads, s.head_dim, s.value_dim) for s in attention_sites(base)] == [(2, 4, 4)] * 2
    assert {(s.head_dim, s.value_dim) for s in attention_sites(base_of("deepseek_v3"))} == {(8, 6)}
    bloom = base_of("bloom")
    assert not uses_interface(bloom) and [s.heads for s in attention_sites(bloom)] == [4, 4]


def test_calls_say_what_went_in_and_out():
    calls = base_of("albert").observed.calls
    call = calls["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"]
    assert (call.inputs, call.gives, call.times) == (1, "tensor", 2)
    assert call.input_shape is not None and call.output_shape is not None
    assert (call.input_shape[-1], call.output_shape[-1]) == (16, 24)
    assert first_tensor((None,), {"x": torch.ones(2)}) is not None


def test_a_base_that_cannot_be_run_says_why():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

        def forward(self, input_ids):
            raise ValueError("no such thing\nsecond line")

    base = find(Odd())
    assert (base.observed.ran, base.observed.why) == (False, "no such thing")
    assert base.observed.silent(["layers.0.0"]) == [] and not base.observed.unusable
    assert [s.path for s in select_projections(base, "all-linear")] == ["layers.0.0"]
    with torch.device("meta"):
        assert run_tiny(nn.Linear(2, 2)) == "the model's parameters hold no numbers"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_broken_observation_leaves_nothing(error):
    model = make("llama").train()

    def broken(*_):
        raise error

    handle = model.model.norm.register_forward_hook(broken)
    base = find(model)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            _ = base.observed
    else:
        assert not base.observed.ran and base.observed.why == "MemoryError"
    handle.remove()
    assert all(m.training for m in model.modules()) and HANDLER.get() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert find(model).observed.ran


def test_threads_share_one_observation():
    base = base_of("llama")
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(base.observed)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(map(id, found))) == 1


def test_another_threads_forward_is_not_recorded():
    base = base_of("llama")
    model, started = base.model, threading.Event()

    def beside(*_):
        if not started.is_set():
            started.set()
            other = threading.Thread(target=lambda: model(torch.tensor([[3, 4, 5, 6, 7]])))
            other.start()
            other.join()

    handle = model.model.layers[0].register_forward_pre_hook(beside)
    calls = base.observed.calls
    handle.remove()
    assert {call.times for call in calls.values()} == {1}


def test_observing_inside_inference_mode():
    base = base_of("llama")
    with torch.inference_mode():
        assert base.observed.ran and len(base.observed.same_input) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_show_the_same(dtype):
    for name in ("llama", "gemma3", "bert", "mixtral"):
        one, other = find(make(name)), find(make(name, dtype=dtype))
        paths = [{m: p for p, m in base.model.named_modules()} for base in (one, other)]
        streams = [{k: p[v] for k, v in b.observed.streams.items()} for b, p in zip((one, other), paths, strict=True)]
        assert streams[0] == streams[1]
        assert one.observed.same_input == other.observed.same_input
        assert one.observed.norm_offset == other.observed.norm_offset

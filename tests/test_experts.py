"""LoRA on mixtures whose experts are parameters: formulas read off modules, HF PEFT both ways, rows that keep apart."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

import inlay
from curves import adamw_losses
from inlay.errors import FormatError, UsageError
from inlay.formats.experts import unstacked_keys
from inlay.kernels.experts import ExpertProduct, expert_linear
from inlay.merging.merge import merge_to_folder
from inlay.runs.run import run
from inlay.runtime.memory import TokenBudget
from inlay.sites.structure import find
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import reviews, settings  # noqa: F401
from test_training import examples, same
from zoo import small

EAGER = {"experts_implementation": "eager"}
LATENT = dict(
    num_key_value_heads=4, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, **EAGER,
)  # fmt: skip
FOUR = dict(num_experts_per_tok=2, **EAGER)
BASES = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**small(head_dim=4, num_local_experts=4, **FOUR))),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**small(head_dim=4, num_experts=4, moe_intermediate_size=8, **FOUR))
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**small(num_experts=4, **FOUR))),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**small(n_group=2, topk_group=1, **LATENT))),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**small(head_dim=4, num_local_experts=4, **FOUR))),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **small(
                head_dim=4, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1,
                intermediate_size_mlp=24,
            )
        )
    ),
    "glm4_moe": lambda: tf.Glm4MoeForCausalLM(
        tf.Glm4MoeConfig(
            **small(
                head_dim=4, n_routed_experts=4, moe_intermediate_size=8, n_group=1, topk_group=1,
                first_k_dense_replace=1, **FOUR,
            )
        )
    ),
    "phimoe": lambda: tf.PhimoeForCausalLM(tf.PhimoeConfig(**small(num_local_experts=4, **FOUR))),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(
        tf.NemotronHConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, layers_block_type=["attention", "moe"],
            num_attention_heads=4, num_key_value_heads=2, head_dim=4, n_routed_experts=4, moe_intermediate_size=8,
            moe_shared_expert_intermediate_size=8, n_group=1, topk_group=1, **FOUR,
        )
    ),
    "gemma4": lambda: tf.Gemma4ForCausalLM(  # its blocks hold the experts, beside a dense MLP
        tf.Gemma4TextConfig(
            **small(
                head_dim=4, global_head_dim=4, num_experts=4, top_k_experts=2, moe_intermediate_size=8,
                enable_moe_block=True, hidden_size_per_layer_input=0, vocab_size_per_layer_input=48,
                num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], **EAGER,
            )
        )
    ),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(
            vocab_size=48, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=4,
            intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        )
    ),
    "longcat": lambda: tf.LongcatFlashForCausalLM(
        tf.LongcatFlashConfig(
            **small(
                "intermediate_size", "num_hidden_layers", num_layers=1, num_key_value_heads=4, ffn_hidden_size=24,
                expert_ffn_hidden_size=8, n_routed_experts=4, zero_expert_num=2, moe_topk=2, q_lora_rank=8,
                kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, head_dim=4,
            )
        )
    ),
}  # fmt: skip
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4", "glm4_moe"]
IDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 0, "atol": 1e-6}  # norms round to float32 over whatever base
EXACT = {"rtol": 0, "atol": 1e-12}


def make(name, dtype=torch.float64):
    """A random base whose experts matter, with biases and norms of their own."""
    torch.manual_seed(0)
    model = BASES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.3)
    return model.to(dtype)


def randomise(parameters, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)


def theirs(name, targets, parameters, **more):
    """HF PEFT's model with random values."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, target_parameters=parameters, **more)
    model = peft.get_peft_model(make(name), config).eval()
    randomise(p for p in model.parameters() if p.requires_grad)
    return model


def both(name, dtype=torch.float64):
    """A bank with two adapters on experts, of unlike ranks and targets."""
    bank = inlay.attach(make(name, dtype))
    bank.add("all", inlay.LoRA(r=3, alpha=5, targets=["o_proj", "experts"]))
    bank.add("down", inlay.LoRA(r=2, targets=["o_proj"], target_parameters=["experts.down_proj"]))
    randomise(bank.parameters())
    return bank


def logits(bank, rows, ids=IDS):
    with torch.no_grad(), bank.route(rows):
        return bank.model(input_ids=ids).logits


def score(logits):
    return logits.log_softmax(-1)[..., 5].mean()


# ---- what is read off a module


@pytest.mark.parametrize("name", [*FAMILIES, "phimoe", "nemotron_h", "gemma4"])
def test_a_formula_is_found_for_every_parameter_of_experts(name):
    base = find(make(name, torch.float32))
    stacked = [path for path, p in base.model.named_parameters() if p.ndim == 3 and ".experts." in path]
    assert [site.path for site in base.experts] == stacked and not base.unread_mixtures
    for site in base.experts:
        mixture = base.mixtures[site.module]
        assert site.weight().shape == (4, site.out_features, site.in_features) and site.layer is not None
        assert site.stored_transposed == (name in ("gpt_oss", "llama4"))
        assert (mixture.first.bias is not None) == (name == "gpt_oss")


@pytest.mark.parametrize(("name", "kind"), [("jetmoe", "JetMoeParallelExperts"), ("longcat", "LongcatFlashExperts")])
def test_a_module_that_computes_something_else_is_refused_by_its_class(name, kind):
    base = find(make(name, torch.float32))
    with pytest.raises(UsageError, match=kind):
        inlay.LoRA(targets="experts").sites(base)
    assert not base.experts


def test_a_module_that_does_more_than_it_shows_is_refused():
    model = make("mixtral")
    kind = type(model.model.layers[1].mlp.experts)
    odd = type("Odd", (kind,), {"forward": lambda self, *args: kind.forward(self, *args).clamp(max=1.0)})
    model.model.layers[1].mlp.experts.__class__ = odd
    base = find(model)
    assert {site.layer for site in base.experts} == {0}
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.experts\.down_proj, whose module is of the class Odd"):
        inlay.LoRA(target_parameters=["layers.1.mlp.experts.down_proj"]).sites(base)


@pytest.mark.parametrize(
    ("method", "word"),
    [
        (lambda: inlay.LoRA(target_parameters=["gate.weight"]), "holds no experts"),
        (lambda: inlay.LoRA(target_parameters=["q_proj.weight"]), "Name the layer in targets"),
        (lambda: inlay.LoRA(target_parameters=["w1"]), "matches no parameter"),
        (lambda: inlay.LoRA(targets="experts", dropout=0.1), "dropout"),
        (lambda: inlay.LoRA(targets="mlp"), 'LoRA takes them by its target "experts"'),
        (lambda: inlay.DoRA(targets="experts"), "DoRA does not act on parameters of experts"),
        (lambda: inlay.VeRA(targets="experts"), "target 'experts' matches no module"),
    ],
)
def test_what_cannot_be_is_said(method, word):
    with pytest.raises(UsageError) as caught:
        method().sites(find(make("mixtral")))
    assert word in str(caught.value)


def test_targets_choose_among_experts():
    base = find(make("deepseek_v3"))
    assert not any(site.experts for site in inlay.LoRA().sites(base))
    every = inlay.LoRA(targets=["all-linear", "experts"]).sites(base)
    assert [s.name for s in every if s.experts] == ["gate_up_proj", "down_proj"]
    one = inlay.LoRA(targets="experts", target_parameters=["down_proj"], layers="last 1").sites(base)
    assert [s.path for s in one] == [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    with pytest.raises(UsageError, match="layers"):
        inlay.LoRA(targets="experts", layers=[0]).sites(base)


# ---- the computation


def test_gradients_of_the_products_are_right():
    torch.manual_seed(0)
    spans, own = [(0, 0, 2), (2, 2, 5)], [(0, 1, 2), (2, 2, 4)]
    x, weight, bias, down, up = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 4), (3, 5, 4), (3, 5), (3, 2, 4), (3, 5, 2))
    )

    def product(x, weight, bias, down, up, transposed):
        return expert_linear(x, weight, bias, transposed, spans, [ExpertProduct(own, 0.7, down, up)])

    assert torch.autograd.gradcheck(lambda *args: product(*args, False), (x, weight, bias, down, up))
    turned = weight.detach().mT.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: product(*args, True), (x, turned, bias, down, up))
    torch.testing.assert_close(product(x, weight, bias, down, up, False), product(x, turned, bias, down, up, True))
    assert not product(x, weight, bias, down, up, False)[5].any()


def test_products_of_few_rows_at_many_experts_are_one():
    """Padded products give what each alone gives, forwards and backwards, and no padding counts."""
    torch.manual_seed(0)
    own = [(0, 0, 2), (1, 3, 4), (4, 5, 7), (5, 7, 9)]
    spans = [(expert, first, last) for expert, (first, last) in {0: (0, 3), 1: (3, 5), 4: (5, 7), 5: (7, 9)}.items()]
    x, weight, down, up = (torch.randn(s, dtype=torch.float64) for s in ((9, 4), (6, 5, 4), (6, 2, 4), (6, 5, 2)))
    found = []
    for pieces in ([own], [own[:2], own[2:]]):  # two spans are too few to be batched
        tensors = [t.clone().requires_grad_() for t in (x, down, up)]
        products = [ExpertProduct(piece, 0.7, *tensors[1:]) for piece in pieces]
        made = expert_linear(tensors[0], weight, None, False, spans, products)
        made.cos().sum().backward()
        found.append([made, *(t.grad for t in tensors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert not found[0][2][2].any() and found[0][2][[0, 1, 4, 5]].abs().amin(0).min() > 0


@pytest.mark.parametrize("name", [*FAMILIES, "phimoe", "gemma4"])
def test_rows_keep_apart(name):
    bank = both(name)
    plain = logits(bank, [None] * 3)
    mixed = logits(bank, ["all", None, "down"])
    alone = [logits(bank, [row], IDS[i : i + 1]) for i, row in enumerate(["all", None, "down"])]
    torch.testing.assert_close(mixed, torch.cat(alone), **CLOSE)
    torch.testing.assert_close(mixed[1], plain[1], **CLOSE)
    assert (mixed - plain).abs().amax((1, 2))[[0, 2]].min() > 0.1
    with torch.no_grad():
        for parameter in bank.parameters("down"):
            parameter.fill_(math.nan)
    poisoned = logits(bank, ["all", None, "down"])
    assert poisoned[2].isnan().all()
    torch.testing.assert_close(poisoned[:2], mixed[:2], **CLOSE)  # groups of other sizes round differently
    bank.detach()
    assert "forward" not in vars(find(bank.model).experts[0].module)


def test_chains_and_weights_add_up():
    bank = both("mixtral")
    experts = [site for site in bank.base.experts if site.name == "down_proj"]
    expected = []
    for weights in ({"all": 0.5, "down": 2.0}, {"all": 1.0, "down": 1.0}):
        model = make("mixtral")
        for name, weight in weights.items():
            part = bank.adapters[name].parts[0]
            for path, site in part.sites.items():
                own = part.form(path, None, {}).product() * weight
                model.get_parameter(path if site.experts else f"{path}.weight").data += own
        expected.append(model(input_ids=IDS).logits)
    assert experts
    torch.testing.assert_close(logits(bank, [{"all": 0.5, "down": 2.0}] * 3), expected[0], **CLOSE)
    torch.testing.assert_close(logits(bank, [["all", "down"]] * 3), expected[1], **CLOSE)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_packed_padded_and_written_rows_agree(name):
    bank = both(name)
    rows = ["all", None, "down"]
    mixed = logits(bank, rows)
    assert bank.packs
    with torch.no_grad(), bank.stream([(row, 6) for row in rows]):
        packed = bank.model(input_ids=IDS.view(1, -1)).logits
    torch.testing.assert_close(packed.view_as(mixed), mixed, **CLOSE)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with bank.route(rows):
        written = bank.model.generate(input_ids=IDS, attention_mask=mask, **given)
    for i, row in enumerate(rows):
        ids = IDS[i : i + 1, 2 * (i == 0) :]
        with bank.route([row]):
            alone = bank.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
        assert written[i, -4:].tolist() == alone[0, -4:].tolist()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_however_the_base_computes_its_experts(implementation):
    exact = logits(both("qwen3_moe"), ["all", None, "down"])
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        bank = both("qwen3_moe", dtype)
        bank.model.config._experts_implementation = implementation
        made = logits(bank, ["all", None, "down"])
        assert (made.double() - exact).norm() / exact.norm() < bound


def test_under_autocast():
    bank = both("mixtral", torch.float32)
    expected = logits(bank, ["all", None, "down"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = logits(bank, ["all", None, "down"])
    assert (made - expected).norm() / expected.norm() < 0.1


# ---- training


def test_raced_learners_equal_their_solo_runs():
    plans = [
        Plan("experts", inlay.LoRA(r=3, targets="experts"), lr=1e-2, batch_size=3, steps=4, seed=1),
        Plan("layers", inlay.LoRA(r=2, dropout=0.2), lr=1e-2, batch_size=2, steps=4, seed=2),
    ]

    def trained(own):
        bank = inlay.attach(make("qwen3_moe"))
        for _ in train_steps(bank, add_learners(bank, own, 24), examples(), TokenBudget(4096)):
            pass
        return bank

    together = trained(plans)
    for plan in plans:
        same(together, trained([plan]), plan.name, 1e-7)


def test_recomputed_blocks_give_the_same_gradients():
    found = []
    for recomputed in (False, True):
        bank = both("mixtral")
        with bank.recomputing() if recomputed else bank.alone(), bank.route(["all", None, "down"]):
            score(bank.model(input_ids=IDS).logits).backward()
        found.append([p.grad for p in bank.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_a_training_run_has_the_losses_of_hf_peft(name, tmp_path):
    reference = theirs(name, ["o_proj"], ["experts.gate_up_proj", "experts.down_proj"])
    reference.save_pretrained(tmp_path)
    bank = inlay.attach(make(name))
    bank.load("a", tmp_path)
    bank.set("a")
    expected = adamw_losses(reference, [p for p in reference.parameters() if p.requires_grad], IDS, 1e-2, 5)
    made = adamw_losses(bank.model, list(bank.parameters("a")), IDS, 1e-2, 5)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_a_fresh_adapter_starts_as_hf_peft_does():
    bank = inlay.attach(make("mixtral"))
    bank.add("a", inlay.LoRA(r=2, targets="experts"))
    plain = logits(bank, [None] * 3)
    torch.testing.assert_close(logits(bank, ["a"] * 3), plain, **CLOSE)
    for path, site in bank.adapters["a"].sites.items():
        a = bank.adapters["a"].params[path]["A"]
        assert a.shape == (4, 2, site.in_features) and 0.8 / site.in_features**0.5 < a.abs().max()
        assert a.abs().max() <= 1 / site.in_features**0.5


# ---- HF PEFT's checkpoints

CASES = {
    "both": (["o_proj"], ["experts.gate_up_proj", "experts.down_proj"]),
    "down": ([], ["down_proj"]),
    "up": (["o_proj"], ["gate_up_proj"]),
}


@pytest.mark.parametrize(
    ("name", "case"), [*((name, "both") for name in FAMILIES), *((n, c) for n in ("mixtral", "llama4") for c in CASES)]
)
def test_checkpoints_go_both_ways(name, case, tmp_path):
    reference = theirs(name, *CASES[case], rank_pattern={"gate_up_proj": 2})
    reference.save_pretrained(tmp_path / "theirs")
    expected = reference(input_ids=IDS).logits
    score(expected).backward()
    bank = inlay.attach(make(name))
    adapter = bank.load("a", tmp_path / "theirs")
    bank.set("a")
    ours = bank.model(input_ids=IDS).logits
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (ours - make(name)(input_ids=IDS).logits).abs().max() > 0.1
    score(ours).backward()
    sites = list(adapter.sites.values())
    root = "base_model.model."
    own = {f"{root}{s.path}.lora_{k}.weight": adapter.params[s.path][k].grad for s in sites for k in "AB"}
    gradients = {key.replace(".default", ""): p.grad for key, p in reference.named_parameters() if p.requires_grad}
    for key, gradient in unstacked_keys(own, sites).items():
        torch.testing.assert_close(gradient, gradients.pop(key), **CLOSE)
    assert not gradients
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **CLOSE)
    bank.set(None)
    bank.merge("a")
    torch.testing.assert_close(logits(bank, [None] * 3), ours.detach(), **CLOSE)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", ["all-linear", ["all-linear", "experts"]])
def test_layers_beside_experts_survive_hf_peft(name, targets, tmp_path):
    """HF PEFT takes dense layers of the experts' names for experts."""
    bank = inlay.attach(make(name))
    method = inlay.LoRA(
        r=2, targets=targets, rank_pattern={"down_proj": 3, "o_proj": 1}, alpha_pattern={"up_proj": 7.0}
    )
    bank.add("a", method)
    randomise(bank.parameters())
    ours = logits(bank, ["a"] * 3)
    bank.save("a", tmp_path)
    back = peft.PeftModel.from_pretrained(make(name), tmp_path).eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **CLOSE)
    bank.load("b", tmp_path)
    torch.testing.assert_close(logits(bank, ["b"] * 3), ours, rtol=0, atol=0)


def separate(folder, name, around, names, experts=range(4), rslora=False, ranks=None):
    """A file of LoRA on experts that were modules, and the logits of the base with it in its weights."""
    gate, up, down = ("w1", "w3", "w2") if "w1" in names or "w2" in names else ("gate_proj", "up_proj", "down_proj")
    model, generator, tensors, ranks = make(name), torch.Generator().manual_seed(3), {}, ranks or {}
    for site in find(make(name)).experts:
        layer, weight = site.path.split(".")[2], model.get_parameter(site.path).data
        for expert in experts:
            for own in (own for own in names if (own == down) == (site.name == "down_proj")):
                half = site.out_features // (1 if own == down else 2)
                r = ranks.get(own, 2)
                a = torch.randn(r, site.in_features, generator=generator, dtype=torch.float64) * 0.3
                b = torch.randn(half, r, generator=generator, dtype=torch.float64) * 0.3
                first = half if own == up else 0
                weight[expert, first : first + half] += b @ a * 5 / (r**0.5 if rslora else r)
                key = f"base_model.model.model.layers.{layer}.{around}.{expert}.{own}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    assert gate
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 5, "lora_dropout": 0.05, "use_rslora": rslora,
        "rank_pattern": ranks, "target_modules": [f"experts.{e}.{own}" for own in names for e in experts],
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model(input_ids=IDS).logits.detach()


NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("name", "around", "names", "more"),
    [
        ("mixtral", "block_sparse_moe.experts", ("w1", "w2", "w3"), {}),
        ("qwen3_moe", "mlp.experts", NAMES, {"rslora": True}),
        ("olmoe", "mlp.experts", NAMES, {"ranks": {"gate_proj": 3}}),
        ("deepseek_v3", "mlp.experts", NAMES[1:2], {}),
        ("glm4_moe", "mlp.experts", NAMES[2:], {"experts": [1, 2]}),
    ],
)
def test_files_of_experts_that_were_modules_are_read(name, around, names, more, tmp_path):
    expected = separate(tmp_path / "old", name, around, names, **more)
    bank = inlay.attach(make(name))
    bank.load("a", tmp_path / "old")
    ours = logits(bank, ["a"] * 3)
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (ours - logits(bank, [None] * 3)).abs().max() > 0.1
    bank.save("a", tmp_path / "new")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "new").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, **CLOSE)


def test_files_that_cannot_be_joined_are_refused(tmp_path):
    separate(tmp_path / "a", "qwen3_moe", "mlp.experts", NAMES)
    with pytest.raises(FormatError, match=r"experts\.0\.\w+_proj for one, which the base holds as parameters"):
        inlay.attach(make("gpt_oss")).load("a", tmp_path / "a")
    wide = tf.Qwen3MoeConfig(**small(head_dim=4, num_experts=3, moe_intermediate_size=8, **FOUR))
    with pytest.raises(FormatError, match="3 experts"):
        inlay.attach(tf.Qwen3MoeForCausalLM(wide)).load("a", tmp_path / "a")


def test_broken_files_are_refused_by_name(tmp_path):
    bank = both("mixtral")
    with pytest.raises(UsageError, match="loralib has no place for parameters of experts"):
        bank.save("all", tmp_path / "lora.safetensors", format="loralib")
    bank.save("all", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def refused(match, **changed):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(FormatError, match=match):
            inlay.attach(make("mixtral")).load("a", tmp_path)

    refused("which its target_parameters do not name", target_parameters=["experts.down_proj"])
    refused("which holds no experts", target_parameters=[*config["target_parameters"], "gate.weight"])
    refused("matches no parameter", target_parameters=["experts.w2"])
    refused("no list of names", target_parameters="experts.down_proj")
    refused("holds no tensor", target_parameters=[*config["target_parameters"], "q_proj.weight"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="5 experts"):
        wide = tf.MixtralConfig(**small(head_dim=4, num_local_experts=5, **FOUR))
        inlay.attach(tf.MixtralForCausalLM(wide)).load("a", tmp_path)


# ---- experts that are modules still


def test_experts_of_their_own_are_refused_where_rows_differ():
    """Each gets tokens of any rows: that their number is a multiple of the rows says nothing."""
    config = tf.NllbMoeConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_experts=4, encoder_sparse_step=1,
        decoder_sparse_step=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    bank = inlay.attach(tf.NllbMoeForConditionalGeneration(config).double().eval())
    every = {site.path for site in bank.base.projections if ".experts." in site.path}
    assert every and every <= bank.base.observed.scattered
    bank.add("a", inlay.LoRA(r=2))
    randomise(bank.parameters())
    ids = torch.randint(3, 48, (4, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), bank.route(["a"] * 4):
        together = bank.model(input_ids=ids, decoder_input_ids=ids).logits
    with torch.no_grad(), bank.route(["a"]):
        alone = [bank.model(input_ids=row[None], decoder_input_ids=row[None]).logits for row in ids]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)
    with pytest.raises(UsageError, match=r"experts\.expert_\d\.fc1"), bank.route(["a", None, "a", None]):
        bank.model(input_ids=ids, decoder_input_ids=ids)


# ---- what people run


def folder_of(tokenizer, folder):
    config = tf.MixtralConfig(
        **small("vocab_size", vocab_size=len(tokenizer), head_dim=4, num_local_experts=4, num_experts_per_tok=2)
    )
    torch.manual_seed(0)
    tf.MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_says_what_is_left_out_and_is_merged(tokenizer, reviews, tmp_path):  # noqa: F811
    base, lines = folder_of(tokenizer, tmp_path / "base"), []
    given = {"steps": 2, "verbalizer": "0=negative,1=positive"}
    run(settings(base, reviews, tmp_path / "plain", **given), on_message=lines.append)
    (line,) = [line for line in lines if "experts" in line]
    assert "% of the base's weights" in line and "experts.gate_up_proj, experts.down_proj" in line
    lines.clear()
    own = {"r": 2, "targets": ["all-linear", "experts"]}
    run(settings(base, reviews, tmp_path / "experts", set=own, **given), on_message=lines.append)
    assert not any("leaves out" in line for line in lines)
    told = merge_to_folder(str(base), str(tmp_path / "experts"), str(tmp_path / "merged"))
    assert told["max_difference"] < 1e-4

"""The family of bottleneck adapters gives what AdapterHub's package gave, with its gradients, and keeps the laws.

golden/make_adapterhub_bottlenecks.py made the numbers.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.activations import ACT2FN

import inlay
from adapterhub import base_of, copy, inputs_of
from inlay.batch.noise import Noise
from inlay.errors import UsageError
from inlay.kernels.bottlenecks import Bottlenecks
from inlay.kernels.couplings import glow, nice
from inlay.kernels.phm import phm_matrix, phm_product
from inlay.methods.common import ACTIVATIONS
from inlay.methods.form import BottleneckForm
from inlay.training.loop import train
from inlay.training.plan import Plan
from test_parts import said, saved, scrambled
from test_training import examples
from zoo import make

FAMILIES = ("llama", "gpt2", "bert")


def golden(name):
    """The logits of each kind, and its weights and their gradients by AdapterHub's names."""
    found = {}
    for part in ("networks", "settings", "gates"):
        tensors = load_file(Path(__file__).parent / "golden" / f"bottlenecks_{name}_{part}.safetensors")
        names = json.loads(zlib.decompress(bytes(tensors["names"].tolist())))
        for kind, listed in names.items():
            sizes = [math.prod(shape) for _, shape in listed]
            both = [tensors[f"{kind}/{what}"].double().split(sizes) for what in ("values", "grads")]
            entries = zip(listed, *both, strict=True)
            own = {key: (value.view(shape), grad.view(shape)) for (key, shape), value, grad in entries}
            found[kind] = tensors[f"{kind}/logits"].double(), own
    return found


GOLDEN = {name: golden(name) for name in FAMILIES}
SMALL = {"reduction_factor": 4}
KINDS = {
    "inv": lambda: inlay.PfeifferInv(**SMALL),
    "double_inv": lambda: inlay.HoulsbyInv(**SMALL, inv_adapter_reduction_factor=4, undo=False),
    "plus": lambda: inlay.AdapterPlus(**SMALL),
    "compacter": lambda: inlay.Compacter(**SMALL),
    "compacter_pp": lambda: inlay.CompacterPlusPlus(reduction_factor=2, phm_rank=2, non_linearity="tanh"),
    "own_rules": lambda: inlay.Compacter(
        reduction_factor=2, phm_dim=2, shared_phm_rule=False, factorized_phm_W=False
    ),
    "factor_rules": lambda: inlay.Compacter(
        reduction_factor=4, factorized_phm_rule=True, phm_bias=False, shared_W_phm=True
    ),
    "gated": lambda: inlay.Pfeiffer(**SMALL, use_gating=True),
    "par_gated": lambda: inlay.Parallel(**SMALL, use_gating=True, scaling="channel"),
    "norms": lambda: inlay.Houlsby(**SMALL, ln_before=True, ln_after=True, scaling=2.0),
    "norm_of_sum": lambda: inlay.Pfeiffer(
        **SMALL, ln_after=True, adapter_residual_before_ln=True, scaling="learned"
    ),
    "par_norm": lambda: inlay.Parallel(**SMALL, ln_after=True, ln_before=True, mh_adapter=True),
    "behind": lambda: inlay.Pfeiffer(**SMALL, residual_before_ln=False),
    "post_add": lambda: inlay.Pfeiffer(**SMALL, residual_before_ln="post_add"),
    "goes_on": lambda: inlay.Pfeiffer(**SMALL, residual_before_ln=False, original_ln_after=False, leave_out=[0]),
    "gated_lora": lambda: inlay.GatedLoRA(r=2),
}  # fmt: skip
STACKS = {"llama": "model", "gpt2": "transformer", "bert": "bert"}


def theirs(name, kind, path, site, own, normed):
    """AdapterHub's key of our parameter."""
    if not path:
        network, _, end = own.partition("_")
        if network in ("F", "G"):
            end = end.replace("down", "0").replace("up", "2").replace("_bias", ".bias")
            return f"{STACKS[name]}.invertible_adapters.{kind}.{network}.{end if '.' in end else end + '.weight'}"
        own = own if own.startswith("phm") else f"W_{own}"
        return f"{STACKS[name]}.shared_parameters.{kind}.{own}"
    if site.kind == "linear":
        end = {"A": "lora_A", "B": "lora_B", "gate": "gate.weight", "gate_bias": "gate.bias"}[own]
        return f"{path}.loras.{kind}.{end}"
    part = "output" if site.part == "mlp" else "attention.output" if name == "bert" else "attention"
    block = path[: path.index(".", path.index(f".{site.layer}.") + 1)]
    start = f"{block}.{part}.adapters.{kind}" if name == "bert" else f"{block}.{part}_adapters.adapters.{kind}"
    place, _, end = own.partition("_")
    if place in ("down", "up"):
        place = "adapter_up" if place == "up" else f"adapter_down.{1 if normed else 0}"
        factored = "compacter" in kind or "rules" in kind
        ends = {"": "weight", "bias": "b" if factored else "bias", "left": "W_left", "right": "W_right", "W": "W"}
        return f"{start}.{place}.{ends.get(end, end)}"
    ends = {"norm_before": "adapter_norm_before", "norm_after": "adapter_norm_after", "gate": "gate"}
    if own == "scale":
        return f"{start}.scaling"
    return f"{start}.{ends[own.removesuffix('_bias')]}.{'bias' if own.endswith('_bias') else 'weight'}"


def pairs(parts, name, kind):
    """Each of our parameters with AdapterHub's key."""
    for part in parts:
        normed = getattr(part.method, "ln_before", False)
        for path, own in part.params.items():
            for key, value in own.items():
                yield value, theirs(name, kind, path, part.sites.get(path), key, normed)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_it_gives_what_adapterhub_does_with_its_gradients(name, kind):
    if kind not in GOLDEN[name]:
        pytest.skip("AdapterHub cannot run it there, or lays it out otherwise")
    bank, (expected, weights) = inlay.attach(base_of(name)), GOLDEN[name][kind]
    adapter = bank.add("a", KINDS[kind](), seed=0)
    found = list(pairs(adapter.parts, name, kind))
    assert {key for _, key in found} == set(weights)
    for value, key in found:
        copy(value, weights[key][0])
    inputs = inputs_of(name)
    bank.set("a")
    logits = bank.model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    ids = inputs["input_ids"]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for value, key in found:
        torch.testing.assert_close(value.grad, weights[key][1], rtol=1e-5, atol=1e-7)


NETWORK = {"embedding": "wte.weight", "w1": "control_trans.0.weight", "b1": "control_trans.0.bias"}
NETWORK |= {"w2": "control_trans.2.weight", "b2": "control_trans.2.bias"}


def prefix_pairs(part, kind, weights):
    """Each parameter of a gated prefix with AdapterHub's value and its gradient, where both are of one shape."""
    stored = {key.partition("self_prefix.")[2]: both for key, both in weights.items() if "self_prefix." in key}
    for path, own in part.params.items():
        for name, value in own.items():
            if path:
                end = "weight" if name == "row_gate" else "bias"
                yield value, *weights[f"{path}.prefix_tuning.prefix_gates.{kind}.{end}"]
            elif name in NETWORK:
                yield value, *stored[NETWORK[name]]
            elif "control_trans" in stored:
                yield value, *(one.view(value.shape) for one in stored["control_trans"])
            else:  # its table is of the stream's width, ours of the keys', which are narrower here
                inner = torch.tanh(
                    stored["wte.weight"][0] @ stored["control_trans.0.weight"][0].T + stored["control_trans.0.bias"][0]
                )
                yield value, inner @ stored["control_trans.2.weight"][0].T + stored["control_trans.2.bias"][0], None


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in FAMILIES for k in ("unipelt", "own_gates") if k in GOLDEN[n]]
)
def test_prefixes_behind_gates_give_what_adapterhub_does(name, kind):
    bank, (expected, weights) = inlay.attach(base_of(name)), GOLDEN[name][kind]
    whole = inlay.UniPELT(num_virtual_tokens=3, encoder_hidden_size=6, reduction_factor=4, r=2).parts()
    if kind == "own_gates":
        whole = [inlay.GatedPrefix(2, prefix_projection=False, shared_gating=False)]
    elif name == "llama":
        whole[0] = inlay.GatedPrefix(3, prefix_projection=False)
    adapter = bank.add("a", whole, seed=0)
    prefix, *others = adapter.parts
    found = list(prefix_pairs(prefix, kind, weights))
    found += [(value, *weights[key]) for value, key in pairs(others, name, kind)]
    for value, theirs_, _ in found:
        copy(value, theirs_)
    inputs = inputs_of(name)
    bank.set("a")
    logits = bank.model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    ids = inputs["input_ids"]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for value, _, grad in found:
        if grad is not None:  # the reference computes Llama's softmax in float32
            torch.testing.assert_close(value.grad, grad, rtol=1e-4, atol=1e-6)


# ---- networks


@pytest.mark.parametrize("couple", [nice, glow])
def test_a_coupling_is_undone_exactly(couple):
    torch.manual_seed(1)
    sizes = {"nice": ((4, 3), (3, 4)), "glow": ((3, 8), (4, 6))}[couple.__name__]
    layers = [torch.randn(behind, before, dtype=torch.float64) for before, behind in sizes]
    networks = [lambda x, w=w: torch.tanh(x @ w.T) for w in layers]
    x = torch.randn(5, 7, dtype=torch.float64)
    y = couple(x, *networks, undo=False)
    assert (y - x).abs().max() > 0.1
    torch.testing.assert_close(couple(y, *networks, undo=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_sum_of_kronecker_products_is_never_formed_to_multiply_with_it(rank):
    torch.manual_seed(1)
    x, rule = torch.randn(6, 32), torch.randn(4, 4, 4)
    left, right = torch.randn(4, 8, rank), torch.randn(4, rank, 5)
    whole = sum(torch.kron(rule[s], left[s] @ right[s]) for s in range(4))
    torch.testing.assert_close(phm_matrix(rule, left @ right), whole)
    torch.testing.assert_close(phm_product(x, rule, left, right), x @ whole, rtol=1e-4, atol=1e-4)


def test_scales_of_many_bottlenecks_are_numbers_or_vectors():
    torch.manual_seed(1)
    own = [(torch.randn(r, 6), torch.randn(r), torch.randn(6, r), torch.randn(6)) for r in (3, 10, 2)]
    scales = [2.0, torch.randn(1), torch.randn(6)]
    z = torch.randn(5, 6)
    made = Bottlenecks.of([(*o, s) for o, s in zip(own, scales, strict=True)], [1, 2, 2], torch.relu)(z)
    expected = [
        BottleneckForm(*o, torch.relu, s).added(part)
        for o, s, part in zip(own, scales, z.split([1, 2, 2]), strict=True)
    ]
    torch.testing.assert_close(made, torch.cat(expected))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3"])
def test_what_the_first_block_reads_is_coupled_and_the_head_undoes_it(name):
    bank = inlay.attach(make(name))
    adapter = bank.add("both", [inlay.Parallel(reduction_factor=4), inlay.Invertible(inv_adapter="glow")], seed=1)
    alone = bank.add("alone", inlay.Parallel(reduction_factor=4), seed=1)
    scrambled(bank)
    for path, own in alone.params.items():
        for key, value in own.items():
            copy(value, adapter.parts[0].params[path][key])
    coupling, head = adapter.parts[1], bank.model.get_output_embeddings()
    first, last = coupling.sites.values()
    assert first.path.endswith(".0") and last.module is head
    couple = lambda x, site: coupling.method.input(coupling.params[""], x, site, None)  # noqa: E731
    ids = torch.arange(3, 10)[None]
    with bank.route(["alone"]):
        embedded = couple(bank.model.get_input_embeddings()(ids), first)
        states = bank.model.base_model(inputs_embeds=embedded).last_hidden_state
    torch.testing.assert_close(said(bank, "both"), head(couple(states, last)).detach(), rtol=0, atol=1e-10)


# ---- settings


def test_activations_are_those_that_transformers_names():
    x = torch.linspace(-7, 7, 41, dtype=torch.float64)
    for name, activation in ACTIVATIONS.items():
        expected = ACT2FN["leaky_relu" if name == "leakyrelu" else name](x)
        torch.testing.assert_close(activation(x), expected, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("base", ["llama", "bert", "t5"])
@pytest.mark.parametrize("kind", ["inv", "plus", "compacter", "factor_rules", "own_rules", "norm_of_sum", "gated_lora"])
def test_a_saved_adapter_opens_again(kind, base, tmp_path):
    bank = saved(KINDS[kind](), tmp_path, base)
    other = inlay.attach(make(base))
    again = other.load("b", tmp_path)
    for part, own in zip(bank.adapters["a"].parts, again.parts, strict=True):
        assert own.params.keys() == part.params.keys()
        for path, values in part.params.items():
            for key, value in values.items():
                assert torch.equal(own.params[path][key], value)
    assert torch.equal(run(other, "b", base), run(bank, "a", base))


def run(bank, name, base):
    ids = torch.arange(3, 9)[None]
    with bank.route([name]):
        return bank.model(input_ids=ids, **({"decoder_input_ids": ids} if base == "t5" else {})).logits.detach()


def test_rules_that_are_not_learned_stay():
    bank = inlay.attach(make("llama"))
    adapter = bank.add("a", inlay.Compacter(reduction_factor=4, learn_phm=False), seed=1)
    assert not adapter.params[""]["phm_rule"].requires_grad and len(adapter.params[""]) == 1
    assert all(p.requires_grad for path, own in adapter.params.items() if path for p in own.values())


def test_blocks_are_left_out():
    bank = inlay.attach(make("llama"))
    left, kept = inlay.Houlsby(leave_out="first 1"), inlay.Houlsby(layers=[1])
    assert [s.path for s in left.sites(bank.base)] == [s.path for s in kept.sites(bank.base)] != []
    with pytest.raises(UsageError, match="finds no attention"):
        bank.add("a", inlay.Houlsby(leave_out=[0, 1]))


def test_blocks_have_sizes_of_their_own():
    bank = inlay.attach(make("llama"))
    adapter = bank.add("a", inlay.Pfeiffer(reduction_factor={0: 8, "default": 2}), seed=1)
    sizes = {site.layer: len(adapter.params[path]["down"]) for path, site in adapter.sites.items()}
    assert sizes == {0: 2, 1: 8}
    with pytest.raises(UsageError, match="no number for block 1"):
        bank.add("b", inlay.Pfeiffer(reduction_factor={"0": 8}))


WRONG = {
    "numbers by block": lambda: inlay.Pfeiffer(reduction_factor={"first": 2}),
    "parallel and sets original_ln_before": lambda: inlay.Parallel(original_ln_before=True),
    "parallel and sets stochastic_depth": lambda: inlay.ScaledParallel(stochastic_depth=0.1),
    "'post_add' without": lambda: inlay.Houlsby(residual_before_ln="post_add"),
    "number above 0": lambda: inlay.Pfeiffer(scaling="much"),
    "true, false": lambda: inlay.Pfeiffer(residual_before_ln="post"),
    "would lose the stream": lambda: inlay.Pfeiffer(original_ln_after=False),
    "does not divide the 16": lambda: inlay.Compacter(phm_dim=3),
    "drop_layers is 2": lambda: inlay.Houlsby(drop_layers=2),
}


@pytest.mark.parametrize("words", list(WRONG))
def test_what_could_not_be_right_is_refused(words):
    bank = inlay.attach(make("bert"))
    with pytest.raises(UsageError) as caught:
        bank.add("a", WRONG[words]())
    assert words in str(caught.value)


def test_couplings_that_cannot_be_undone_are_refused():
    with pytest.raises(UsageError, match=r"reads 16 features, .* 8"):
        inlay.attach(make("albert")).add("a", inlay.Invertible())
    bank = inlay.attach(make("llama"))
    for name in ("a", "b"):
        bank.add(name, inlay.Invertible(), seed=1)
    with bank.route([["a", "b"]]), pytest.raises(UsageError, match="'a' and 'b' cannot be used together"):
        bank.model(input_ids=torch.arange(3, 6)[None])


# ---- chance


def noisy(bank, name, step, sample, rows=1):
    ids = torch.arange(3, 10)[None].expand(rows, -1)
    noise = Noise([step] * rows, [sample + row for row in range(rows)])
    with bank.route([name] * rows, noise=noise):
        return bank.model(input_ids=ids).logits.detach()


def test_each_step_leaves_out_the_adapters_of_its_own_first_blocks():
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.Houlsby(reduction_factor=4, drop_layers=1), seed=1)
    bank.add("upper", inlay.Houlsby(reduction_factor=4, layers=[1]), seed=1)
    scrambled(bank)
    for path, own in bank.adapters["upper"].params.items():
        for key, value in own.items():
            copy(value, bank.adapters["a"].params[path][key])
    whole, upper = said(bank, "a"), said(bank, "upper")
    found = []
    for step in range(12):
        made = noisy(bank, "a", step, sample=5)
        same = noisy(bank, "a", step, sample=7, rows=2)[1:]
        torch.testing.assert_close(made, same, rtol=0, atol=1e-12)  # what is drawn is the step's, not the sample's
        dropped = torch.allclose(made, upper, rtol=0, atol=1e-12)
        assert dropped or torch.allclose(made, whole, rtol=0, atol=1e-12)
        found.append(dropped)
    assert {True, False} == set(found)
    bank.model.train()
    bank.set("a")
    with pytest.raises(UsageError, match="draws by the step"):
        bank.model(input_ids=torch.arange(3, 10)[None])


def test_stochastic_depth_leaves_rows_out_and_scales_the_others():
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.AdapterPlus(reduction_factor=4, stochastic_depth=0.5, layers=[1]), seed=1)
    bank.add("twice", inlay.AdapterPlus(reduction_factor=4, stochastic_depth=0, layers=[1]), seed=1)
    scrambled(bank)
    for path, own in bank.adapters["twice"].params.items():
        for key, value in own.items():
            copy(value, bank.adapters["a"].params[path][key] * (2 if key == "scale" else 1))
    plain, twice = said(bank, None), said(bank, "twice")
    rows = noisy(bank, "a", 4, 0, rows=16)
    kept = [torch.allclose(row[None], twice, rtol=0, atol=1e-12) for row in rows]
    left = [torch.allclose(row[None], plain, rtol=0, atol=1e-12) for row in rows]
    assert all(a != b for a, b in zip(kept, left, strict=True)) and 2 < sum(kept) < 14
    torch.testing.assert_close(noisy(bank, "a", 4, 4), rows[4:5], rtol=0, atol=1e-12)  # a row's own chance


def test_each_is_trained_together_with_others_as_alone():
    methods = {
        "drop": inlay.Houlsby(reduction_factor=4, drop_layers=1, dropout=0.1),
        "plus": inlay.AdapterPlus(reduction_factor=4, stochastic_depth=0.5),
        "unipelt": GATED["unipelt"](),
        "inv": inlay.PfeifferInv(reduction_factor=4),
        "compacter": inlay.Compacter(reduction_factor=4),
    }
    plans = [
        Plan(name, method, lr=1e-2, batch_size=2 + number % 3, steps=3, seed=number)
        for number, (name, method) in enumerate(methods.items())
    ]
    together = inlay.attach(make("gpt2"))
    train(together, plans, examples())
    for plan in plans:
        alone, fresh = inlay.attach(make("gpt2")), inlay.attach(make("gpt2"))
        train(alone, [plan], examples())
        fresh.add(plan.name, plan.method, seed=plan.seed)
        own = list(alone.parameters(plan.name))
        torch.testing.assert_close(own, list(together.parameters(plan.name)), rtol=0, atol=1e-12)
        assert any((a - b).abs().max() > 1e-2 for a, b in zip(own, fresh.parameters(plan.name), strict=True))


# ---- gates


GATED = {
    "bottleneck": KINDS["gated"],
    "lora": KINDS["gated_lora"],
    "prefix": lambda: inlay.GatedPrefix(num_virtual_tokens=3, prefix_projection=False, shared_gating=False),
    "unipelt": lambda: inlay.UniPELT(num_virtual_tokens=2, encoder_hidden_size=6, reduction_factor=4, r=2),
}


@pytest.mark.parametrize("kind", list(GATED))
def test_a_gate_is_the_prompts_and_steps_from_a_cache_keep_it(kind):
    bank = inlay.attach(make("llama"))
    bank.add("a", GATED[kind](), seed=1)
    scrambled(bank)
    ids = torch.arange(3, 10)[None]
    with bank.route(["a"], prompts=[4]):
        whole = bank.model(input_ids=ids).logits
        short = bank.model(input_ids=ids[:, :5]).logits
    torch.testing.assert_close(short, whole[:, :5], rtol=0, atol=1e-10)  # nothing behind the prompt moves it
    assert not torch.allclose(said(bank, "a")[:, :5], short, rtol=0, atol=1e-4)  # where the row is its own prompt
    with torch.no_grad(), bank.route(["a"]):
        out = bank.model(input_ids=ids[:, :4], use_cache=True)
        cache = getattr(out, "past_key_values", None) or out.cache
        for at in range(4, 7):
            step = bank.model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(step, whole[:, at : at + 1], rtol=0, atol=1e-10)
    with torch.no_grad(), bank.route(["a"], prompts=[6]), pytest.raises(UsageError, match="not here as a whole"):
        bank.model(input_ids=ids[:, :4], use_cache=True)


def test_the_mean_of_a_long_prompt_is_exact_in_few_bits():
    bank = inlay.attach(make("llama", dtype=torch.bfloat16))
    bank.model.config.max_position_embeddings = 4096
    adapter = bank.add("a", inlay.GatedLoRA(r=2, targets=["q_proj"], layers=[0]), seed=1)
    seen = []
    module = next(iter(adapter.sites.values())).module
    for own in adapter.params.values():
        torch.nn.init.ones_(own["B"])
        torch.nn.init.zeros_(own["gate"])  # a gate of one half for each token
    module.register_forward_hook(lambda _, args, out: seen.append(out.detach().float()))
    ids = torch.arange(3, 43).repeat(40)[None]
    with torch.no_grad():
        for row in (None, "a"):
            with bank.route([row]):
                bank.model(input_ids=ids)
    added = seen[1] - seen[0]
    x = bank.model.model.layers[0].input_layernorm(bank.model.model.embed_tokens(ids)).float()
    expected = (x @ next(iter(adapter.params.values()))["A"].float().T).sum(-1, keepdim=True).expand_as(added) / 2
    assert (added - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", ["prefix", "unipelt"])
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_gated_prefixes_open_again_without_their_network(kind, base, tmp_path):
    bank = saved(GATED[kind](), tmp_path, base)
    other = inlay.attach(make(base))
    other.load("b", tmp_path)
    torch.testing.assert_close(run(other, "b", base), run(bank, "a", base), rtol=0, atol=1e-6)


def test_a_gated_product_outside_of_blocks_is_refused():
    with pytest.raises(UsageError, match="lm_head outside of the blocks"):
        inlay.attach(make("llama")).add("a", inlay.GatedLoRA(targets=["lm_head"]))

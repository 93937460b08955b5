"""HF PEFT's further methods against HF PEFT 0.21.2: starts, checkpoints both ways, gradients, merges, mixed rows."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.batch.noise import Noise
from inlay.errors import FormatError, UsageError
from inlay.methods.table import METHODS
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_training import examples, same
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "intermediate.dense", "output.dense"],
    "gpt2": ["c_attn", "c_fc"],
}
EXACT = {"rtol": 0, "atol": 1e-9}
SINGLE = {"rtol": 1e-4, "atol": 1e-5}
CONV1D = {"randlora", "hira", "gralora", "pvera"}
"""Those that act on GPT-2's layers in HF PEFT too."""
FLOAT32 = {"c3a"}
"""Those that HF PEFT computes in float32 whatever the base is."""
WRONG_BEFORE = {"c3a"}
"""Those whose input HF PEFT gives a wrong gradient: its last layer alone learns what it should."""

CASES = {
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "loha-wide": ("LoHaConfig", {"r": 5, "alpha": 10, "alpha_pattern": {"0.*q_proj": 5, "0.*query": 5}}),
    "loha-ranks": ("LoHaConfig", {"r": 4, "rank_pattern": {"q_proj": 2, "query": 16}}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "lokr-whole": ("LoKrConfig", {"r": 8, "decompose_factor": 4}),
    "lokr-both": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 3}),
    "miss": ("MissConfig", {"r": 4}),
    "miss-uneven": ("MissConfig", {"r": 5}),
    "miss-bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "miss-mini": ("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "oft-nearest": ("OFTConfig", {"oft_block_size": 7, "num_cayley_neumann_terms": 3}),
    "oft-exact": ("OFTConfig", {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False}),
    "oft-shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 2}),
    "boft": ("BOFTConfig", {}),
    "boft-blocks": ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 2}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra-orthonormal": ("HRAConfig", {"r": 3, "apply_GS": True}),
    "hira": ("HiraConfig", {"r": 3, "rank_pattern": {"q_proj": 2}}),
    "road": ("RoadConfig", {"group_size": 8}),
    "road-2": ("RoadConfig", {"group_size": 4, "variant": "road_2"}),
    "road-4": ("RoadConfig", {"group_size": 8, "variant": "road_4"}),
    "randlora": ("RandLoraConfig", {"r": 5, "projection_prng_key": 7}),
    "randlora-sparse": ("RandLoraConfig", {"r": 4, "randlora_alpha": 8, "sparse": True, "save_projection": False}),
    "randlora-very": ("RandLoraConfig", {"r": 4, "very_sparse": True}),
    "pvera": ("PveraConfig", {"r": 5, "projection_prng_key": 7}),
    "pvera-drawn": ("PveraConfig", {"r": 3, "save_projection": False, "d_initial": 0.3}),
    "c3a": ("C3AConfig", {"block_size": 8, "block_size_pattern": {"q_proj": 4}}),
    "gralora": ("GraloraConfig", {"r": 4}),
    "gralora-hybrid": ("GraloraConfig", {"r": 6, "alpha": 9, "hybrid_r": 2}),
    "shira": ("ShiraConfig", {"r": 2, "random_seed": 3}),
}  # fmt: skip
PAIRS = [(case, base) for case in CASES for base in ("llama", "bert")]
PAIRS += [(case, "gpt2") for case in CASES if case.partition("-")[0] in CONV1D]
STARTS = {
    "loha": {"r": 2}, "lokr": {"r": 2}, "miss": {"r": 4}, "oft": {"oft_block_size": 4}, "boft": {}, "hra": {"r": 4},
    "hira": {"r": 3}, "road": {"group_size": 8}, "randlora": {"r": 5}, "gralora": {"r": 4}, "shira": {"r": 2},
    "pvera": {"r": 5}, "c3a": {"block_size": 8, "init_weights": "zeros"},
}  # fmt: skip
"""One of each method, at its start."""


def base(name, dtype=torch.float64):
    """With biases, where it has any, that are not zero."""
    model = make(name, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def reference(case, name, dtype=torch.float64, **more):
    kind, settings = CASES[case]
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    config = getattr(peft, kind)(target_modules=TARGETS[name], **{**settings, **fan, **more})
    model = peft.get_peft_model(base(name, dtype), config).eval()
    randomise(p for p in model.parameters() if p.requires_grad)
    return model


def randomise(parameters, by=0.2):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * by)


def near(case):
    return SINGLE if case.partition("-")[0] in FLOAT32 else EXACT


def logits(bank, *rows):
    rows = rows * len(IDS) if len(rows) == 1 else rows
    with bank.route(list(rows)):
        return bank.model(input_ids=IDS[: len(rows)]).logits


def stepped(model, parameters, keys):
    loss = model(input_ids=IDS, labels=IDS).loss
    return dict(zip(keys, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_checkpoints_go_both_ways_and_train_alike(case, name, tmp_path):
    theirs = reference(case, name)
    theirs.save_pretrained(tmp_path / "theirs")
    bank = inlay.attach(base(name))
    adapter = bank.load("a", tmp_path / "theirs")
    assert type(adapter.method) is METHODS[case.partition("-")[0]]
    ours = logits(bank, "a")
    assert (ours - logits(bank, None)).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, **near(case))

    bank.save("a", tmp_path / "ours")
    stored, again = (load_file(tmp_path / side / FILE) for side in ("theirs", "ours"))
    copies = {key for key in stored if key not in again}
    assert not copies or (len(copies) == 2 * len(adapter.sites) and all(".randlora_" in key for key in copies))
    assert {k: (v.shape, v.dtype) for k, v in again.items()} == {
        k: (v.shape, v.dtype) for k, v in stored.items() if k not in copies
    }
    back = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **near(case))

    bank.set("a")
    params = {f"{path}.{own}": p for path, held in adapter.params.items() for own, p in held.items()}
    params = {key: p for key, p in params.items() if p.requires_grad}
    ends = {
        f"{site.path}.{own}": f"base_model.model.{site.path}.{end}"
        for site in adapter.sites.values() for own, (end, _) in adapter.method.peft_keys(site).items()
    }  # fmt: skip
    gradients = stepped(bank.model, list(params.values()), [ends[key] for key in params])
    named = {key.replace(".default", ""): p for key, p in back.named_parameters() if p.requires_grad}
    assert sorted(named) == sorted(gradients)
    first = -1 if case in WRONG_BEFORE else 0
    for key, expected in list(stepped(back, list(named.values()), list(named)).items())[first:]:
        torch.testing.assert_close(gradients[key].reshape(expected.shape), expected, **near(case))
        assert expected.abs().max() > 0

    merged = theirs.merge_and_unload().state_dict()
    bank.set(None)
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, ours, **EXACT)
    for key, value in bank.model.state_dict().items():
        torch.testing.assert_close(value, merged[key], **near(case))


def started(name, **dtype):
    """A bank with one adapter of each method, at its start."""
    bank = inlay.attach(base(name, **dtype))
    for number, (method, settings) in enumerate(STARTS.items()):
        bank.add(method, METHODS[method](targets=TARGETS[name], **settings), seed=number)
    return bank


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_fresh_adapter_changes_nothing(name):
    bank = started(name)
    for method in STARTS:
        torch.testing.assert_close(logits(bank, method), logits(bank, None), **EXACT)


@pytest.mark.parametrize("case", [case for case in CASES if "orthonormal" not in case])
def test_a_fresh_adapter_is_drawn_as_the_reference_draws_it(case):
    """Smallest and largest numbers, and how they spread, at a site of the width of a small model's."""
    kind, settings = CASES[case]

    def model():
        return torch.nn.Sequential(torch.nn.Linear(96, 192))

    theirs = peft.get_peft_model(model(), getattr(peft, kind)(target_modules=["0"], **settings))
    method = METHODS[case.partition("-")[0]].from_peft(theirs.peft_config["default"].to_dict(), ["0"])
    site = inlay.methods.contract.Site("0", "linear", model()[0], in_features=96, out_features=192)
    made = method.create(site, torch.Generator().manual_seed(3))
    stored = {**dict(theirs.named_parameters()), **getattr(theirs.base_model.model[0], "shira_indices", {})}
    for name, (end, shape) in method.peft_keys(site).items():
        module, _, last = end.partition(".")
        found = [v for k, v in stored.items() if f".{module}.default" in f".{k}" and k.endswith(last)]
        if name == "indices":
            assert torch.equal(made[name].int(), stored["default"])
            continue
        (value,) = found
        assert value.shape == shape
        ours, expected = made[name].flatten(), value.detach().flatten()
        assert bool(ours.any()) == bool(expected.any())
        for measure in (torch.min, torch.max, torch.std) if len(ours) > 64 else ():  # few numbers tell little
            assert float(measure(ours)) == pytest.approx(float(measure(expected)), rel=0.25, abs=1e-9), (name, measure)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_row_never_sees_its_neighbours(name):
    """Not even one whose adapter has diverged; in outputs and in gradients."""
    bank = started(name)
    bank.add("broken", METHODS["oft"](targets=TARGETS[name], oft_block_size=4))
    bank.add("lora", inlay.LoRA(r=2, targets=TARGETS[name]))
    randomise(bank.parameters())
    with torch.no_grad():
        for parameter in bank.parameters("broken"):
            parameter.fill_(torch.nan)
    rows = [*STARTS, "broken", None, "lora", {"loha": 0.5, "road": 2.0}, ["boft", "lokr", "hira"], {"oft": 1.0}]
    ids = torch.randint(3, 48, (len(rows), 5), generator=torch.Generator().manual_seed(4))
    with bank.route(rows):
        together = bank.model(input_ids=ids).logits
    assert together[rows.index("broken")].isnan().all()
    losses = torch.nan_to_num(together).square().mean((1, 2))
    for number, row in enumerate(rows):
        if row == "broken":
            continue
        with bank.route([row]):
            alone = bank.model(input_ids=ids[number : number + 1]).logits
        torch.testing.assert_close(together[number], alone[0], **EXACT)
        assert row is None or (alone - logits_of(bank, ids[number])).abs().max() > 1e-4
        names = [] if row is None else [row] if isinstance(row, str) else list(row)
        own = [p for one in names for p in bank.parameters(one)]
        got = torch.autograd.grad(losses[number], own, retain_graph=True) if own else ()
        expected = torch.autograd.grad(alone.square().mean(), own) if own else ()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    torch.testing.assert_close(together[rows.index({"oft": 1.0})][None], one_of(bank, "oft", ids[-1]), **EXACT)


def one_of(bank, name, ids):
    with bank.route([name]):
        return bank.model(input_ids=ids[None]).logits


def logits_of(bank, ids):
    return one_of(bank, None, ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_text_that_goes_on_from_a_cache_is_that_of_a_whole_forward(name):
    bank = started(name)
    randomise(bank.parameters())
    rows = [*STARTS, None]
    ids = torch.randint(3, 48, (len(rows), 6), generator=torch.Generator().manual_seed(4))
    with bank.route(rows):
        whole = bank.model(input_ids=ids).logits
        cache = bank.model(input_ids=ids[:, :4], use_cache=True).past_key_values
        for at in (4, 5):
            step = bank.model(input_ids=ids[:, at : at + 1], past_key_values=cache)
            torch.testing.assert_close(step.logits[:, 0], whole[:, at], **EXACT)


@pytest.mark.parametrize("method", list(STARTS))
def test_a_layer_that_stores_its_weight_transposed_is_served_saved_and_merged(method, tmp_path):
    bank = inlay.attach(base("gpt2"))
    bank.add("a", METHODS[method](targets=TARGETS["gpt2"], **STARTS[method]), seed=1)
    randomise(bank.parameters())
    ours = logits(bank, "a")
    assert (ours - logits(bank, None)).abs().max() > 1e-3
    bank.save("a", tmp_path)
    bank.load("again", tmp_path)
    torch.testing.assert_close(logits(bank, "again"), ours, **EXACT)
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, ours, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_bits_agree_within_their_rounding(dtype):
    exact, bank = (started("llama", dtype=kind) for kind in (torch.float64, dtype))
    for each in (exact, bank):
        randomise(each.parameters(), 0.0)
    torch.manual_seed(2)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), bank.parameters(), strict=True):
            q.add_(torch.randn_like(q) * 0.1)
            p.copy_(q)
        for p, q in zip(exact.model.parameters(), bank.model.parameters(), strict=True):
            p.copy_(q)
    for method in STARTS:
        ours = logits(bank, method)
        assert ours.dtype == dtype
        right = logits(exact, method)
        assert float((ours.double() - right).norm() / right.norm()) < 10 * torch.finfo(dtype).eps, method
        grads = torch.autograd.grad(ours.float().square().mean(), list(bank.parameters(method)))
        assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)


@torch.no_grad()
def test_factors_of_boft_are_those_of_the_reference(monkeypatch, tmp_path):
    """HF PEFT computes several factors on a GPU alone, through an extension of its own; here by what that computes."""
    from peft.tuners.boft import layer

    class Diagonal:
        apply = staticmethod(lambda blocks: torch.stack([torch.block_diag(*own) for own in blocks]))

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Diagonal)
    for size, factors in ((2, 3), (4, 2)):
        config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["q_proj"])
        theirs = peft.get_peft_model(base("llama"), config).eval()
        randomise(p for p in theirs.parameters() if p.requires_grad)
        folder = tmp_path / str(size)
        theirs.save_pretrained(folder)
        bank = inlay.attach(base("llama"))
        bank.load("a", folder)
        torch.testing.assert_close(logits(bank, "a"), theirs(input_ids=IDS).logits, **EXACT)
        expected = logits(bank, "a")
        bank.merge("a")
        torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("loha", {"r": 99}, "LoHa's r is 99"),
        ("loha", {"targets": ["embed_tokens"]}, "embed_tokens, which is a table"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor is 0"),
        ("miss", {}, "MiSS's r is 64"),
        ("miss", {"r": 5, "variant": "bat"}, "does not divide both sides"),
        ("miss", {"r": 4, "mini_r": 3, "variant": "mini"}, "mini_r is 3"),
        ("oft", {"r": 2}, "r is 2 and its oft_block_size 32"),
        ("boft", {"boft_block_size": 5}, "blocks of 5 do not divide"),
        ("boft", {"boft_block_size": 4, "boft_n_butterfly_factor": 4}, "no 4 factors"),
        ("hra", {"r": 3}, "start in pairs"),
        ("hra", {"apply_GS": True}, "no start that leaves the base"),
        ("hra", {"r": 18}, "reads 16 features"),
        ("road", {}, "group_size is 64"),
        ("road", {"group_size": 3}, "group_size is 3"),
        ("c3a", {}, "block_size is 256, which does not divide both sides"),
        ("gralora", {"r": 5}, "gralora_k of 2 does not divide"),
        ("gralora", {"r": 3, "gralora_k": 3}, "which does not divide both sides"),
        ("shira", {}, "has fewer"),
        ("hira", {"r": 99}, "HiRA's r is 99"),
        ("randlora", {"r": 99}, "RandLoRA's r is 99"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(method, settings, said):
    bank = inlay.attach(base("llama"))
    with pytest.raises(UsageError, match=said):
        bank.add("a", METHODS[method](**settings))
    assert not bank.adapters


def test_files_that_cannot_be_right_are_refused(tmp_path):
    for case, key, change, said in (
        ("shira", "shira_indices", lambda t: t + 100, "entries that its weight does not have"),
        ("randlora", "v_proj.randlora_A", lambda t: t + 1, "is not what all sites share"),
    ):
        reference(case, "llama").save_pretrained(tmp_path / case)
        tensors = load_file(tmp_path / case / FILE)
        changed = next(name for name in tensors if name.endswith(key))
        save_file({**tensors, changed: change(tensors[changed])}, tmp_path / case / FILE)
        with pytest.raises(FormatError, match=said):
            inlay.attach(base("llama")).load("a", tmp_path / case)
    reference("oft", "llama").save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / CONFIG).read_text())
    del config["oft_block_size"]
    (tmp_path / "old" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"PEFT 0\.14"):
        inlay.attach(base("llama")).load("a", tmp_path / "old")


def test_dropout_falls_on_what_the_adapter_reads_alone():
    bank = inlay.attach(base("llama"))
    settings = {"hira": {"r": 3}, "miss": {"r": 4}, "randlora": {"r": 5}, "gralora": {"r": 4}, "pvera": {"r": 5}}
    for method, own in settings.items():
        bank.add(method, METHODS[method](dropout=0.5, targets=["down_proj"], **own))

    def trained(method):
        with bank.route([method] * 2, noise=Noise([0, 0], [0, 1])):
            return bank.model(input_ids=IDS).logits

    for method in settings:
        torch.testing.assert_close(trained(method), logits(bank, None), **EXACT)
    randomise(bank.parameters())
    for method in settings:
        assert (trained(method) - logits(bank, method)).abs().max() > 1e-4
        assert torch.equal(trained(method), trained(method))


def test_pvera_draws_for_the_token_wherever_it_stands():
    bank = inlay.attach(base("llama"))
    bank.add("a", inlay.PVeRA(r=5, targets=["down_proj"]), seed=1)
    randomise(bank.parameters())

    def trained(rows, steps, samples):
        with bank.route(["a"] * len(rows), noise=Noise(steps, samples)):
            return bank.model(input_ids=IDS[rows]).logits

    both = trained([0, 1], [0, 0], [0, 1])
    assert (both - logits(bank, "a")).abs().max() > 1e-4
    torch.testing.assert_close(trained([1], [0], [1])[0], both[1], **EXACT)
    torch.testing.assert_close(trained([1, 0], [0, 0], [1, 0]).flip(0), both, **EXACT)
    assert (trained([1], [1], [1])[0] - both[1]).abs().max() > 1e-5
    assert (trained([0, 0], [0, 0], [0, 1])[0] - trained([0, 0], [0, 0], [0, 1])[1]).abs().max() > 1e-5


def test_learners_together_equal_their_solo_runs():
    plans = [
        Plan(name, METHODS[name](**settings), lr=1e-2, batch_size=4 - number % 2, steps=4, seed=number)
        for number, (name, settings) in enumerate(STARTS.items())
    ]
    bank = inlay.attach(make("llama"))
    for _ in train_steps(bank, add_learners(bank, plans, 24), examples(), TokenBudget(4096)):
        pass
    for plan in plans:
        solo = inlay.attach(make("llama"))
        for _ in train_steps(solo, add_learners(solo, [plan], 24), examples(), TokenBudget(4096)):
            pass
        same(bank, solo, plan.name, 1e-9)
        fresh = solo.add("fresh", plan.method, seed=plan.seed)
        moved = zip(fresh.parameters(), solo.parameters(plan.name), strict=True)
        assert any(not torch.equal(start, end) for start, end in moved)


@torch.no_grad()
def test_products_become_loras_of_the_same_function(tmp_path):
    bank = inlay.attach(base("llama"))
    alphas = {"loha": 16, "miss": 4, "hra": 4, "gralora": 128}  # the scale times the rank of the product
    for method in alphas:
        bank.add(method, METHODS[method](targets=TARGETS["llama"], **STARTS[method]), seed=1)
    randomise(bank.parameters())
    for method, alpha in alphas.items():
        bank.save(method, tmp_path / f"{method}.safetensors", format="loralib")
        bank.load("it", tmp_path / f"{method}.safetensors", alpha=alpha)
        torch.testing.assert_close(logits(bank, "it"), logits(bank, method), **EXACT)
        bank.remove("it")


def test_autocast_computes_every_method():
    bank = started("llama", dtype=torch.float32)
    randomise(bank.parameters(), 0.05)
    for method in STARTS:
        right = logits(bank, method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = logits(bank, method)
        assert float((ours - right).norm() / right.norm()) < 0.03, method
        grads = torch.autograd.grad(ours.float().square().mean(), list(bank.parameters(method)))
        assert all(g.isfinite().all() for g in grads)

"""LoRA's starts and its kin against HF PEFT 0.21.2 and loralib: values, logits, training, checkpoints both ways."""

from __future__ import annotations

from importlib import import_module

import loralib
import peft
import pytest
import torch
import transformers as tf
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file

import inlay
from curves import adamw_losses
from inlay.data.encode import Example
from inlay.errors import UsageError
from inlay.runs.run import run
from inlay.runtime.forward import Segment, token_losses
from inlay.runtime.memory import TokenBudget
from inlay.training.acting import Acting
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import content, dying_at, forked, reviews, settings  # noqa: F401
from test_training import examples, same
from zoo import make, small

preprocess_corda = import_module("peft.tuners.lora.corda").preprocess_corda
preprocess_loraga = import_module("peft.tuners.lora.loraga").preprocess_loraga

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(3, 48, (3, 12), generator=torch.Generator().manual_seed(2))
ROWS = {"input_ids": LONG, "attention_mask": (torch.arange(12) < torch.tensor([[12], [10], [7]])).long()}
ROWS["labels"] = LONG.masked_fill((ROWS["attention_mask"] == 0) | (torch.arange(12) < 4), -100)
TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "opt": ["k_proj", "fc1"]}
EXACT = {"rtol": 0, "atol": 1e-9}
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def config(name, **more):
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name], **fan, **more})


def ours_of(name, dtype=torch.float32, rows=None, method=inlay.LoRA, **more):
    bank = inlay.attach(make(name, dtype=dtype))
    given = {"r": 4, "alpha": 6, "targets": TARGETS[name], **more}
    bank.add("a", method(**given), seed=1, rows=rows)
    return bank


def theirs_of(name, how):
    """The reference, begun as `how` says, over a base of its own."""
    model = make(name, dtype=torch.float32)
    if how.startswith("corda"):
        made = config(name, init_lora_weights="corda", corda_config=CordaConfig(corda_method=how[-3:]))
        preprocess_corda(model, made, run_model=lambda: model(input_ids=LONG[:1]))
        return peft.get_peft_model(model, made).eval()
    if how.startswith("lora_ga"):
        _, direction, scale = how.split("-")
        made = config(name, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(direction, scale))
        preprocess_loraga(model, made, lambda: model(**ROWS).loss.backward())
        return peft.get_peft_model(model, made).eval()
    return peft.get_peft_model(model, config(name, init_lora_weights=how)).eval()


def begun(name, how):
    """Ours of the same start."""
    if how.startswith("corda"):
        rows = [{"input_ids": LONG[:1]}]
        return ours_of(name, rows=rows, init="corda", corda_method=how[-3:])
    if how.startswith("lora_ga"):
        _, direction, scale = how.split("-")
        return ours_of(name, rows=[ROWS], init="lora_ga", lora_ga_direction=direction, lora_ga_scale=scale)
    return ours_of(name, init=how)


def pairs(bank, theirs):
    """Ours and the reference's parameters of each site."""
    named = dict(theirs.named_parameters())
    for path, own in bank.adapters["a"].params.items():
        found = {name: named[f"base_model.model.{path}.lora_{name}.default.weight"].detach() for name in ("A", "B")}
        yield path, own, found


EVA = {"init": "eva", "init_rows": 8}
CORDA = {"init": "corda", "rank_pattern": {"q_proj": 4, "[qk]_proj": 3}}  # the first that fits counts
INSIDE = ["pissa", "olora", "corda-ipm", "corda-kpm"]


@pytest.mark.parametrize("how", INSIDE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_start_from_the_weight_is_the_reference_s_and_changes_nothing_at_first(name, how, tmp_path):
    if (name, how) == ("gpt2", "olora"):
        pytest.skip("the reference's start does not fit weights that are stored transposed")
    bank, theirs = begun(name, how), theirs_of(name, how)
    for _, own, found in pairs(bank, theirs):
        product = found["B"] @ found["A"]
        near = {**NEAR, "atol": 5e-5} if how.startswith("corda") else NEAR  # its inverse differs by CPU
        torch.testing.assert_close(own["B"] @ own["A"], product, **near)
        torch.testing.assert_close(own["A"].norm(dim=1), found["A"].norm(dim=1), **NEAR)
        assert not own["A0"].requires_grad and not own["B0"].requires_grad and own["A"].requires_grad
    with torch.no_grad():
        plain = bank.model(input_ids=IDS).logits
        bank.set("a")
        assert torch.equal(bank.model(input_ids=IDS).logits, plain)  # what is subtracted is zero
    parameters = list(bank.adapters["a"].parameters())
    ours = adamw_losses(bank.model, parameters, IDS, lr=1e-3, steps=6)
    reference = adamw_losses(theirs, [p for p in theirs.parameters() if p.requires_grad], IDS, lr=1e-3, steps=6)
    assert ours[0] - ours[-1] > 1e-3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(reference), rtol=0, atol=2e-4)
    expected = bank.model(input_ids=IDS).logits
    bank.save("a", tmp_path)
    back = peft.PeftModel.from_pretrained(make(name, dtype=torch.float32), tmp_path).eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, **NEAR)
    again = inlay.attach(make(name, dtype=torch.float32))
    assert again.load("a", tmp_path).method.r == 8
    again.set("a")
    torch.testing.assert_close(again.model(input_ids=IDS).logits, expected, **NEAR)
    bank.set(None)
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **NEAR)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_begins_in_the_reference_s_directions(direction, scale):
    """A random projection leaves the signs of singular vectors open; of small weights it is exact else."""
    how = f"lora_ga-{direction}-{scale}"
    bank, theirs = begun("llama", how), theirs_of("llama", how)
    for _, own, found in pairs(bank, theirs):
        torch.testing.assert_close(own["A"].abs(), found["A"].abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own["B"].abs(), found["B"].abs(), rtol=1e-3, atol=1e-5)
        assert torch.equal(own["A"], own["A0"]) and torch.equal(own["B"], own["B0"])


def test_lora_ga_s_first_step_goes_where_the_weight_s_own_would(tmp_path):
    """Of all products of rank r, that of the start's directions is nearest to the gradient."""
    bank = ours_of("llama", rows=[ROWS], init="lora_ga", lora_ga_direction="ArB2r", lora_ga_scale="unit")
    model = make("llama", dtype=torch.float32)
    model(**ROWS).loss.backward()
    for path, own in bank.adapters["a"].params.items():
        _, _, vt = torch.linalg.svd(model.get_submodule(path).weight.grad, full_matrices=False)
        torch.testing.assert_close((own["A"] @ vt[:4].t()).abs(), torch.eye(4), rtol=0, atol=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in bank.model.parameters())


@pytest.mark.parametrize(
    "more", [{}, {"eva_use_label_mask": False}, {"eva_whiten": True, "eva_adjust_scaling_factors": False}]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_eva_begins_as_the_reference_with_its_ranks(name, more, tmp_path):
    """Where twice the components are all that there are: the reference draws fewer at random."""
    targets = {"llama": ["q_proj", "k_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"], "opt": ["k_proj", "out_proj"]}[
        name
    ]
    if more.get("eva_whiten"):  # which the reference does twice to layers that read the same
        targets = [target for target in targets if target != "k_proj" or name == "opt"]
    named = {key.removeprefix("eva_"): value for key, value in more.items()}
    model = make(name, dtype=torch.float32)
    made = config(name, target_modules=targets, init_lora_weights="eva", eva_config=peft.EvaConfig(**named))
    theirs = peft.get_peft_model(model, made).eval()
    peft.initialize_lora_eva_weights(theirs, [ROWS], show_progress_bar=False)
    bank = ours_of(name, rows=[ROWS], targets=targets, init="eva", **more)
    adapter = bank.adapters["a"]
    saved = dict(theirs.named_parameters())
    kept = {key.split(".lora_A")[0].removeprefix("base_model.model.") for key in saved if ".lora_A" in key}
    assert kept == {*adapter.params} and adapter.method.init == "kaiming"
    for path, own, found in pairs(bank, theirs):
        twice = 2**0.25 if more.get("eva_whiten") else 1.0  # the reference has seen the batch a second time
        torch.testing.assert_close(own["A"], found["A"] * twice, rtol=1e-3, atol=1e-4)
        assert not own["B"].any() and own["A"].shape == found["A"].shape
        theirs_scale = theirs.get_submodule(f"base_model.model.{path}").scaling["default"]
        assert adapter.method.scale(adapter.sites[path]) == pytest.approx(theirs_scale)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    bank.set("a")
    expected = bank.model(input_ids=IDS).logits
    bank.save("a", tmp_path)
    back = peft.PeftModel.from_pretrained(make(name, dtype=torch.float32), tmp_path).eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, **NEAR)


def test_eva_s_components_of_many_batches_are_those_of_all_tokens():
    from inlay.methods.probes import Components

    torch.manual_seed(0)
    x = torch.randn(3000, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    probe = Components(12, False)
    for piece in x.split(500):
        probe.see(piece, torch.ones(len(piece), dtype=torch.bool), None)
    probe.fit()
    centred = x - x.mean(0)
    _, s, vt = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(probe.singular, s, rtol=1e-8, atol=0)
    torch.testing.assert_close((probe.components @ vt.t()).abs(), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(probe.ratios, s.square() / centred.square().sum(), rtol=1e-8, atol=0)
    torch.testing.assert_close(probe.mean, x.mean(0), **EXACT)


def test_random_starts_leave_the_base_s_logits():
    for init, tolerance in (("kaiming", 0.0), ("gaussian", 0.0), ("orthogonal", 1e-6)):
        bank = ours_of("llama", dtype=torch.float64, init=init)
        own = next(iter(bank.adapters["a"].params.values()))
        assert ("A0" in own) is False and bool(own["A"].any())
        plain = bank.model(input_ids=IDS).logits
        bank.set("a")
        torch.testing.assert_close(bank.model(input_ids=IDS).logits, plain, rtol=0, atol=tolerance)
        if init == "orthogonal":
            assert own["B"].abs().max() > 1e-2
        if init == "gaussian":
            spread = torch.cat([p["A"].flatten() for p in bank.adapters["a"].params.values()]).std()
            assert float(spread) == pytest.approx(1 / 4, rel=0.2)


def test_what_is_subtracted_is_not_rounded_before():
    """Over bfloat16, changes of a start that are far below its rounding still reach the logits."""
    bank = ours_of("llama", dtype=torch.bfloat16, init="pissa")
    part = bank.adapters["a"].parts[0]
    with torch.no_grad():
        for own in part.params.values():
            own["B"].mul_(1 + 2.0**-12)
    for path in part.sites:
        own, form = part.params[path], part.form(path, torch.bfloat16, {})
        product = form.product().float()
        torch.testing.assert_close(product, own["B0"] @ own["A0"] * 2.0**-12 * 1.5, rtol=0.05, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "rows", "said"),
    [
        ({"init": "eva"}, None, "begins from 64 rows"),
        ({"init": "corda"}, None, "rows of data"),
        ({"init": "lora_ga"}, [{"input_ids": LONG}], "bear no loss"),
        ({"init": "eva", "r": 8}, [{"input_ids": LONG[:1, :6]}], "saw 6 tokens"),
        ({"init": "pissa", "r": 17}, None, "16 directions"),
        ({"init": "lora_ga", "r": 9}, [ROWS], "8 directions"),
        ({"init": "orthogonal", "r": 3}, None, "even rank"),
        ({"init": "pissa", "targets": ["embed_tokens"]}, None, "is none"),
        ({"init": "loftqq"}, None, "init"),
    ],
)
def test_starts_that_cannot_be_are_refused(settings, rows, said):
    with pytest.raises(UsageError, match=said):
        ours_of("llama", rows=rows, **settings)


def test_kin_that_cannot_begin_inside_of_the_weight_say_so():
    for kind in (inlay.DoRA, inlay.LoRAFA, inlay.LoRABias, inlay.MergedLoRA):
        with pytest.raises(UsageError, match="cannot begin inside"):
            kind(init="pissa")
    bank = ours_of("llama", rows=[ROWS], method=inlay.DoRA, init="eva")
    plain = bank.model(input_ids=IDS).logits
    bank.set("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "eva", "corda", "lora_ga"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_learners_of_every_start_equal_their_solo_runs(name, init):
    """Rows that a start sees are the first of the learner's own order, alone in their forwards."""
    dtype = torch.float32 if name == "bloom" else torch.float64
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bloom": ["dense_h_to_4h"]}[name]
    own = inlay.LoRA(r=2, targets=targets, init=init, init_rows=6, eva_use_label_mask=False)
    plans = [
        Plan("a", own, lr=1e-3, batch_size=4, steps=4, seed=1),
        Plan("b", inlay.LoRA(r=2, targets=targets), lr=1e-2, batch_size=3, steps=4, seed=2),
    ]
    bank = inlay.attach(make(name, dtype=dtype))
    for _ in train_steps(bank, add_learners(bank, plans, 24, examples=examples()), examples(), TokenBudget(4096)):
        pass
    for plan in plans:
        solo = inlay.attach(make(name, dtype=dtype))
        learners = add_learners(solo, [plan], 24, examples=examples())
        before = learners[0].weights()
        for _ in train_steps(solo, learners, examples(), TokenBudget(4096)):
            pass
        same(bank, solo, plan.name, 1e-9 if dtype == torch.float64 else 2e-3)
        after = learners[0].weights()
        assert all(torch.equal(after[key], before[key]) for key in after if key.endswith(("A0", "B0")))
        assert any(not torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize(
    "given",
    [
        {"init": "eva", "init_rows": 8},
        {"init": "corda", "rank_pattern": {"q_proj": 4, "[qk]_proj": 3}},
        {"init": "lora_ga"},
    ],
)
def test_a_run_of_a_start_from_rows_resumes_to_the_same_files(given, base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    chosen = {"r": 2, **given}
    run(settings(base_folder, reviews, tmp_path / "whole" / "run", set=chosen), on_message=lambda line: None)
    out = tmp_path / "dead" / "run"

    def killed():
        with dying_at(20, monkeypatch):
            run(settings(base_folder, reviews, out, set=chosen), on_message=lambda line: None)

    assert forked(killed) == -9 and [*(out / "checkpoints").iterdir()]
    monkeypatch.setattr("inlay.bank.starting._show", None)  # rows are not seen again
    run(settings(base_folder, reviews, out, set=chosen, resume=True), on_message=lambda line: None)
    assert content(out) == content(tmp_path / "whole" / "run")


# ---- kin


def randomise(parameters, by=0.2):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * by)


def both_ways(name, theirs, kind, tmp_path, tolerance=EXACT):
    """The reference's checkpoint here, and ours there, with equal logits; a merge as well. Returns our adapter."""
    randomise([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    bank = inlay.attach(make(name))
    plain = bank.model(input_ids=IDS).logits
    adapter = bank.load("a", tmp_path / "theirs")
    assert type(adapter.method) is kind
    bank.set("a")
    ours = bank.model(input_ids=IDS).logits
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, **tolerance)
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **tolerance)
    return bank, adapter


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_lora_with_a_bias_is_the_reference_s(name, tmp_path):
    theirs = peft.get_peft_model(make(name), config(name, lora_bias=True, init_lora_weights=False)).eval()
    bank, adapter = both_ways(name, theirs, inlay.LoRABias, tmp_path)
    ours = adamw_losses(bank.model, list(adapter.parameters()), IDS, lr=1e-2, steps=6)
    reference = adamw_losses(theirs, [p for p in theirs.parameters() if p.requires_grad], IDS, lr=1e-2, steps=6)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(reference), rtol=0, atol=1e-7)
    expected = bank.model(input_ids=IDS).logits
    bank.set(None)
    if name == "llama":  # no layer of it has a bias
        with pytest.raises(UsageError, match="has no bias that could hold"):
            bank.merge("a")
        return
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)


def test_lora_fa_trains_b_alone_and_opens_as_lora(tmp_path):
    bank = inlay.attach(make("llama"))
    plan = Plan("fa", inlay.LoRAFA(r=4, targets=["q_proj", "down_proj"]), lr=1e-2, batch_size=4, steps=5, seed=1)
    learners = add_learners(bank, [plan], 24)
    before = learners[0].weights()
    for _ in train_steps(bank, learners, examples(), TokenBudget(4096)):
        pass
    after = learners[0].weights()
    assert all(torch.equal(after[key], before[key]) == key.endswith(":A") for key in after)
    assert {name for own in bank.adapters["fa"].params.values() for name, p in own.items() if p.requires_grad} == {"B"}
    bank.set("fa")
    bank.save("fa", tmp_path)
    back = peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, bank.model(input_ids=IDS).logits, **EXACT)
    assert type(inlay.attach(make("llama")).load("x", tmp_path).method) is inlay.LoRA
    for kind in (inlay.LoRAFA, inlay.LoRABias, inlay.AdaLoRA):
        with pytest.raises(UsageError, match="a table"):
            bank.add("t", kind(targets=["embed_tokens"]))


def adalora(name, **more):
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    given = {"target_r": 2, "init_r": 4, "lora_alpha": 6, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12}
    return peft.AdaLoraConfig(target_modules=TARGETS[name], **fan, **{**given, **more}, task_type="CAUSAL_LM")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_adalora_trains_prunes_and_saves_as_the_reference(name, tmp_path):
    """Loss, penalty, importance and budget, step by step; then checkpoints both ways, with ranks that differ."""
    theirs = peft.get_peft_model(make(name), adalora(name)).double().eval()
    theirs.save_pretrained(tmp_path / "start")
    bank = inlay.attach(make(name))
    adapter = bank.load("a", tmp_path / "start")
    assert type(adapter.method) is inlay.AdaLoRA and adapter.method.alpha == 6
    for path, own in adapter.params.items():
        for key in own:
            saved = dict(theirs.named_parameters())[f"base_model.model.{path}.lora_{key}.default"]
            own[key].data.copy_(saved.detach())
    plan = Plan("a", adapter.method, lr=3e-2, schedule="constant", batch_size=1, steps=12, clip=1e9)
    learner = add_learners(bank, [plan], 1, {"a": adapter})[0]
    trained = [p for n, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in n]
    optimizer = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.0)
    labels = IDS[:1].clone()
    labels[:, :2] = -100
    rows = [Example(tuple(IDS[0].tolist()), tuple(n >= 2 for n in range(IDS.shape[1])), 0)]
    for step, _ in enumerate(train_steps(bank, [learner], rows, TokenBudget(4096)), start=1):
        out = theirs(input_ids=IDS[:1], labels=labels)
        out.loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        with torch.no_grad():
            apart = float(out.loss) - float(adapter.method.penalty(before(learner)))
        assert learner.loss == pytest.approx(apart, abs=1e-6)
        for path, own in adapter.params.items():
            for key in own:
                saved = dict(theirs.named_parameters())[f"base_model.model.{path}.lora_{key}.default"]
                torch.testing.assert_close(own[key], saved, rtol=0, atol=1e-6)
    alive = sum(int((own["E"] != 0).sum()) for own in adapter.params.values())
    assert alive == 2 * len(adapter.params) and len({int((o["E"] != 0).sum()) for o in adapter.params.values()}) > 1
    bank.set("a")
    expected = bank.model(input_ids=IDS).logits
    bank.save("a", tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loose = {"rtol": 0, "atol": 1e-6}  # the reference divides by a float32
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, **loose)
    again = inlay.attach(make(name))
    for number, folder in enumerate(("ours", "theirs")):
        loaded = again.load(folder, tmp_path / folder)
        assert sum(len(own["E"]) for own in loaded.params.values()) == alive
        again.set(folder)
        torch.testing.assert_close(again.model(input_ids=IDS).logits, expected, **(EXACT if number == 0 else loose))
    again.set(None)
    again.merge("ours")
    torch.testing.assert_close(again.model(input_ids=IDS).logits, expected, **EXACT)


def before(learner):
    """The parameters from before the learner's last update."""
    flat = learner.flats[0]
    found = {}
    for (path, name), value in zip(flat.shapes, flat.views(learner._before[0]), strict=True):
        found.setdefault(path, {})[name] = value
    return found


def test_a_run_of_adalora_resumes_to_the_same_files(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    given = {"method": "adalora", "set": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "targets": "qv"}}
    run(settings(base_folder, reviews, tmp_path / "whole" / "run", **given), on_message=lambda line: None)
    for number, point in enumerate((18, 30)):
        out = tmp_path / f"dead{number}" / "run"

        def killed(out=out, point=point):
            with dying_at(point, monkeypatch):
                run(settings(base_folder, reviews, out, **given), on_message=lambda line: None)

        assert forked(killed) == -9 and [*(out / "checkpoints").iterdir()]
        run(settings(base_folder, reviews, out, **given, resume=True), on_message=lambda line: None)
        assert content(out) == content(tmp_path / "whole" / "run")


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        ({"tinit": 3, "tfinal": 3}, 6, "leave no step of 6"),
        ({"target_r": 9, "init_r": 4}, 6, "only shrink"),
    ],
)
def test_adalora_s_schedule_must_fit_the_run(settings, steps, said):
    with pytest.raises(UsageError, match=said):
        add_learners(inlay.attach(make("llama")), [Plan("a", inlay.AdaLoRA(**settings), steps=steps)], 24)
    with pytest.raises(UsageError, match="between steps"):
        plan = Plan("a", inlay.AdaLoRA(init_r=2, target_r=1), steps=6, optimizer="schedule-free")
        add_learners(inlay.attach(make("llama")), [plan], 24)


def test_adalora_in_a_loop_of_ones_own_and_not_in_a_trainer():
    plan = Plan("a", inlay.AdaLoRA(init_r=4, target_r=2, targets=["q_proj"]), lr=1e-2, batch_size=24, steps=4, clip=1e9)
    bank, own = inlay.attach(make("llama")), inlay.attach(make("llama"))
    for _ in train_steps(bank, add_learners(bank, [plan], 24), examples(), TokenBudget(4096)):
        pass
    adapter = own.add("a", plan.method, seed=0)
    acting, optimizer = Acting(adapter, ()), torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    for step in range(1, 5):
        losses = token_losses(own, [Segment("a", example) for example in examples()])
        torch.cat(losses).mean().backward()
        acting.penalise()
        optimizer.step()
        schedule.step()
        acting.after_step(step, 4)
        optimizer.zero_grad()
    same(bank, own, "a", 1e-9)
    assert sum(int((p["E"] != 0).sum()) for p in adapter.params.values()) == 4
    with pytest.raises(UsageError, match="a Trainer does not"):
        inlay.InlayCallback(own, "a")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_adalora_raced_equals_its_solo_run(optimizer):
    method = inlay.AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1, targets=["q_proj", "down_proj"], dropout=0.1)
    plans = [
        Plan("a", method, lr=1e-2, batch_size=4, steps=6, seed=1, optimizer=optimizer),
        Plan("b", inlay.LoRA(r=2), lr=1e-2, batch_size=3, steps=4, seed=2),
    ]
    bank, solo = inlay.attach(make("llama")), inlay.attach(make("llama"))
    for own, given in ((bank, plans), (solo, plans[:1])):
        for _ in train_steps(own, add_learners(own, given, 24), examples(), TokenBudget(4096)):
            pass
    same(bank, solo, "a", 1e-9)
    assert any(bool((own["E"] == 0).any()) for own in bank.adapters["a"].params.values())


def fused(name):
    """A base whose queries, keys and values are one weight of three equal parts."""
    if name == "gpt2":
        return make(name)
    torch.manual_seed(0)
    return tf.Phi3ForCausalLM(tf.Phi3Config(**small("num_key_value_heads", num_key_value_heads=4))).eval().double()


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]])
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_parts_of_fused_weights_are_loralib_s(name, enabled, tmp_path):
    """Logits, gradients, and its state dict both ways; as LoRA in HF PEFT's layout."""
    bank = inlay.attach(fused(name))
    adapter = bank.add("a", inlay.MergedLoRA(r=3, alpha=5, enable_lora=enabled), seed=1)
    assert {site.role for site in adapter.sites.values()} == {"qkv"} and len(adapter.sites) == 2
    plain = bank.model(input_ids=IDS).logits
    bank.set("a")
    assert torch.equal(bank.model(input_ids=IDS).logits, plain)
    randomise(adapter.parameters())
    theirs = fused(name)
    for path, own in adapter.params.items():
        old = theirs.get_submodule(path)
        rows, columns = (old.weight.t() if name == "gpt2" else old.weight).shape
        new = loralib.MergedLinear(columns, rows, r=3, lora_alpha=5, enable_lora=enabled, merge_weights=False)
        new = new.double()
        new.weight.data = (old.weight.t() if name == "gpt2" else old.weight).data.clone()
        new.bias.data = torch.zeros(rows, dtype=torch.float64) if old.bias is None else old.bias.data.clone()
        new.lora_A.data, new.lora_B.data = own["A"].detach().clone(), own["B"].detach().clone()
        theirs.set_submodule(path, new)
    ours, expected = (model(input_ids=IDS).logits for model in (bank.model, theirs))
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, **EXACT)
    modules = dict(theirs.named_modules())
    wanted = [getattr(modules[path], f"lora_{key}") for path, own in adapter.params.items() for key in own]
    grads = torch.autograd.grad(expected.square().sum(), wanted)
    mine = torch.autograd.grad(ours.square().sum(), list(adapter.parameters()))
    torch.testing.assert_close(list(mine), list(grads), rtol=1e-7, atol=1e-9)
    bank.save("a", tmp_path / "ours.safetensors", format="loralib", enabled=enabled)
    saved, state = load_file(tmp_path / "ours.safetensors"), loralib.lora_state_dict(theirs)
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in state)
    again = inlay.attach(fused(name))
    loaded = again.load("a", tmp_path / "ours.safetensors", alpha=5, enabled=enabled)
    assert type(loaded.method) is inlay.MergedLoRA
    again.set("a")
    torch.testing.assert_close(again.model(input_ids=IDS).logits, ours, **EXACT)
    bank.save("a", tmp_path / "peft")
    base = fused(name)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **EXACT)
    again.set(None)
    again.merge("a")
    torch.testing.assert_close(again.model(input_ids=IDS).logits, ours, **EXACT)


def test_parts_that_are_none_are_refused():
    with pytest.raises(UsageError, match="no fused queries"):
        inlay.attach(make("llama")).add("a", inlay.MergedLoRA())
    with pytest.raises(UsageError, match="enables no part"):
        inlay.MergedLoRA(enable_lora=[False, False])
    with pytest.raises(UsageError, match="not 5 equal parts"):
        inlay.attach(make("gpt2")).add("a", inlay.MergedLoRA(enable_lora=[True] * 5, targets=["c_attn"]))
    with pytest.raises(UsageError, match="names 2 parts"):
        inlay.attach(make("gpt2")).add("a", inlay.MergedLoRA(enable_lora=[True, False]))
    for name in ("phi3", "gpt_neox", "bloom"):  # fewer keys than queries; head by head
        with pytest.raises(UsageError, match=r"three equal parts|not 3 equal parts"):
            inlay.attach(make(name, dtype=torch.float32)).add("a", inlay.MergedLoRA())


INVOKED = [5, 6]
CALLED = torch.tensor([[9, 5, 6, 20, 5, 6, 11, 30], [5, 6, 9, 9, 12, 31, 8, 7], [9, 6, 5, 9, 12, 31, 8, 7]])


def alora(name, **more):
    return config(name, alora_invocation_tokens=INVOKED, task_type="CAUSAL_LM", **more)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_alora_acts_from_its_last_invocation_on_as_the_reference(name, tmp_path):
    theirs = peft.get_peft_model(make(name), alora(name, init_lora_weights=False)).eval()
    randomise([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=CALLED).logits
    bank = inlay.attach(make(name))
    plain = bank.model(input_ids=CALLED).logits
    adapter = bank.load("a", tmp_path / "theirs")
    assert type(adapter.method) is inlay.ALoRA and adapter.method.alora_invocation_tokens == INVOKED
    bank.set("a")
    ours = bank.model(input_ids=CALLED).logits
    torch.testing.assert_close(ours, expected, **EXACT)
    for row, start in enumerate((4, 0, 8)):  # the last one, the first token, and a row without
        torch.testing.assert_close(ours[row, :start], plain[row, :start], **EXACT)
        assert start == 8 or (ours[row, start:] - plain[row, start:]).abs().max() > 1e-3
    named = dict(theirs.named_parameters())
    keys = [(path, key) for path, own in adapter.params.items() for key in own]
    wanted = [named[f"base_model.model.{path}.lora_{key}.default.weight"] for path, key in keys]
    grads = torch.autograd.grad(expected.square().sum(), wanted)
    mine = torch.autograd.grad(ours.square().sum(), [adapter.params[path][key] for path, key in keys])
    torch.testing.assert_close(list(mine), list(grads), rtol=1e-7, atol=1e-9)
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=CALLED).logits, ours, **EXACT)
    with pytest.raises(UsageError, match="cannot be merged"):
        bank.merge("a")


def test_alora_is_the_same_padded_packed_and_written():
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.ALoRA(r=4, targets=["q_proj", "down_proj"], alora_invocation_tokens=INVOKED), seed=1)
    bank.add("p", inlay.PromptTuning(num_virtual_tokens=3, init="vocab"), seed=2)
    randomise(bank.parameters("a"))
    rows: list = ["a", None, "a", ["p", "a"], "a"]
    pieces = [CALLED[:1], CALLED[:1], CALLED[1:2, :5], CALLED[:1, 2:], CALLED[2:]]
    ids, mask = torch.zeros(5, 8, dtype=torch.long), torch.zeros(5, 8, dtype=torch.long)
    for row, piece in enumerate(pieces):
        ids[row, 8 - piece.shape[1] :], mask[row, 8 - piece.shape[1] :] = piece[0], 1
    with bank.route(rows):
        padded = bank.model(input_ids=ids, attention_mask=mask).logits
    with bank.stream([(row, piece.shape[1]) for row, piece in zip(rows, pieces, strict=True)]):
        packed = bank.model(input_ids=torch.cat(pieces, 1)).logits
    start = 0
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), bank.route(rows):
        written = bank.model.generate(input_ids=ids, attention_mask=mask, **settings)
        again = bank.model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(written, again)
    for number, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
        n = piece.shape[1]
        with bank.route([row]):
            alone = bank.model(input_ids=piece).logits
            with torch.no_grad():
                said = bank.model.generate(input_ids=piece, attention_mask=torch.ones_like(piece), **settings)
        torch.testing.assert_close(padded[number : number + 1, -n:], alone, rtol=0, atol=1e-6)  # other rotations
        torch.testing.assert_close(packed[:, start : start + n], alone, **EXACT)
        assert torch.equal(written[number, -5:], said[0, -5:])
        start += n


def test_what_alora_cannot_know_is_refused(tokenizer):
    bank = inlay.attach(make("llama"))
    with pytest.raises(UsageError, match="from which tokens on"):
        bank.add("a", inlay.ALoRA())
    with pytest.raises(UsageError, match="one stack"):
        inlay.attach(make("t5")).add("a", inlay.ALoRA(alora_invocation_tokens=[5]))
    with pytest.raises(UsageError, match="one stack"):
        inlay.attach(make("vit")).add("a", inlay.ALoRA(alora_invocation_tokens=[5]))
    bank.add("a", inlay.ALoRA(targets=["q_proj"], alora_invocation_tokens=INVOKED))
    bank.set("a")
    with pytest.raises(UsageError, match="no token ids"):
        bank.model(inputs_embeds=torch.zeros(1, 3, 16, dtype=torch.float64))
    with torch.no_grad():
        cache = bank.model(input_ids=CALLED[2:], use_cache=True).past_key_values
        with pytest.raises(UsageError, match=r"in pieces|in one call"):
            bank.model(input_ids=CALLED[:1], past_key_values=cache)
    filled = inlay.ALoRA(invocation="positive").with_tokenizer(tokenizer)
    assert filled.alora_invocation_tokens == tokenizer("positive", add_special_tokens=False)["input_ids"]


def test_formats_without_a_place_for_the_bias_refuse_it(tmp_path):
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.LoRABias(r=2, targets=["q_proj"]), seed=1)
    randomise(bank.parameters("a"))
    for kind in ("adapterhub", "loralib"):
        with pytest.raises(UsageError, match="LoRA with a bias"):
            bank.save("a", tmp_path / kind, format=kind)


def test_a_start_that_is_taken_back_goes_to_every_format_and_into_mixes(tmp_path):
    bank = ours_of("llama", dtype=torch.float64, init="pissa", targets=["q_proj", "v_proj"])
    randomise(bank.parameters("a"), by=0.05)
    bank.set("a")
    expected = bank.model(input_ids=IDS).logits
    alpha = 6.0
    bank.save("a", tmp_path / "lora.pt", format="loralib")
    bank.save("a", tmp_path / "hub", format="adapterhub")
    for name, folder, more in (("l", "lora.pt", {"alpha": 2 * alpha}), ("h", "hub", {})):
        again = inlay.attach(make("llama"))
        again.load(name, tmp_path / folder, **more)
        again.set(name)
        torch.testing.assert_close(again.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    with bank.route([{"a": 1.0}] * 2):
        torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)

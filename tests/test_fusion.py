"""AdapterFusion gives AdapterHub's numbers, and lives beside the adapters that it is over; make_adapterhub_fusion.py in
golden/ made the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import inlay
from adapterhub import SETUPS, SavedSetup, base_of, inputs_of
from inlay.bases.load import load_base
from inlay.cli.app import app
from inlay.errors import FormatError, UsageError
from inlay.runs.run import run
from inlay.runs.settings import USUAL
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import broken_off, content, reviews, settings  # noqa: F401
from test_training import examples
from zoo import make

FOLDER = Path(__file__).parent / "golden"
EXACT = {"rtol": 0, "atol": 1e-9}
IDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))
KINDS = {
    "dynamic": (inlay.Pfeiffer, {}),
    "static": (inlay.Houlsby, {"value": False, "query_before_ln": True}),  # their adapters read what the sublayer gives
    "whole": (inlay.Pfeiffer, {"residual_before": True, "query_before_ln": True}),
}
NAMES = {
    "down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}  # fmt: skip
OWN = {"Q": "query.weight", "q": "query.bias", "K": "key.weight", "k": "key.bias", "V": "value.weight"}


def place_of(base, name, path):
    """Where AdapterHub keeps what stands at a sublayer."""
    block = next(b for b in base.blocks if path.startswith(b + "."))
    mlp = next(site for site in base.sublayers if site.path == path).part == "mlp"
    if name == "bert":
        return f"{block}.output" if mlp else f"{block}.attention.output"
    return f"{block}.output_adapters" if mlp else f"{block}.attention_adapters"


def fused(name, kind):
    """A bank with AdapterHub's adapters and their fusion "f", and the golden file."""
    golden = load_file(FOLDER / f"fusion_{name}_{kind}.safetensors")
    bank = inlay.attach(base_of(name))
    method, settings = KINDS[kind]
    for end, factor in (("a", 4), ("b", 8)):
        adapter = bank.add(f"{kind}_{end}", method(reduction_factor=factor), seed=0)
        for path, params in adapter.params.items():
            inner = "adapters."
            for own, value in params.items():
                key = f"{place_of(bank.base, name, path)}.{inner}{kind}_{end}.{NAMES[own]}"
                with torch.no_grad():
                    value.copy_(golden[key])
    bank.add("f", inlay.Fusion(adapters=[f"{kind}_a", f"{kind}_b"], **settings), seed=0)
    for key, value in own_of(bank, name, kind).items():
        with torch.no_grad():
            value.copy_(golden[key])
    return bank, golden


def own_of(bank, name, kind):
    return {
        f"{place_of(bank.base, name, path)}.adapter_fusion_layer.{kind}_a,{kind}_b.{OWN[own]}": value
        for path, params in bank.adapters["f"].params.items() for own, value in params.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_logits_and_gradients_are_those_of_adapterhub(name, kind):
    bank, golden = fused(name, kind)
    inputs = inputs_of(name)
    ids = inputs["input_ids"]
    bank.set("f")
    logits = bank.model(**inputs).logits
    torch.testing.assert_close(logits, golden["logits"].double(), rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    part = bank.adapters["f"].parts[0]
    penalty = part.method.penalty(part.params)
    (loss + (0 if penalty is None else penalty)).backward()
    for key, value in own_of(bank, name, kind).items():
        torch.testing.assert_close(value.grad, golden[f"grad/{key}"].double(), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for end in "ab" for p in bank.parameters(f"{kind}_{end}"))


# ---- AdapterHub's folders


@pytest.mark.parametrize(("file", "kind"), SETUPS)
def test_what_adapterhub_saved_gives_its_logits_here(file, kind, tmp_path):
    saved = SavedSetup(file, kind)
    bank, folder = inlay.attach(base_of(saved.base)), saved.to(tmp_path)
    bank.load("whole", folder)
    assert bank.adapters.keys() == {str(folder / "first"), str(folder / "second"), "whole"}
    bank.set("whole")
    torch.testing.assert_close(bank.model(**inputs_of(saved.base)).logits, saved.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("file", "kind"), SETUPS)
def test_what_is_written_here_gives_its_logits_in_adapterhub(file, kind, tmp_path):
    there = SavedSetup(f"written_{file}", kind)
    bank = inlay.attach(base_of(there.base))
    bank.load("f", SavedSetup(file, kind).to(tmp_path / "theirs"))
    bank.set("f")
    made = bank.model(**inputs_of(there.base)).logits
    torch.testing.assert_close(made, there.logits, rtol=0, atol=2e-5)  # what AdapterHub made of what is written next
    bank.save("f", tmp_path / "ours", format="adapterhub")
    for path, own in there.files.items():
        assert json.loads((tmp_path / "ours" / path).read_text()) == own
    for name, tensors in there.tensors.items():
        stored = load_file(next((tmp_path / "ours" / name).glob("*.safetensors")))
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[key], value) for key, value in tensors.items())
    bank.load("again", tmp_path / "ours")
    bank.set("again")
    torch.testing.assert_close(bank.model(**inputs_of(there.base)).logits, made, **EXACT)


def saved_setup(folder, kind="dynamic", edit=lambda config: None):
    """A folder of AdapterHub's over a llama, whose fusion's config is changed, the folder of the fusion, and a bank."""
    saved = SavedSetup("setups_llama", kind)
    edit(saved.files["first,second/adapter_fusion_config.json"])
    return saved.to(folder), folder / "first,second", inlay.attach(base_of("llama"))


def test_a_fusion_alone_is_over_the_adapters_of_the_bank(tmp_path):
    whole, alone, bank = saved_setup(tmp_path)
    with pytest.raises(UsageError) as caught:
        bank.load("f", alone)
    assert "over 'first' and 'second', and the bank has no 'first' and 'second'" in str(caught.value)
    assert "bank.load('first', ...)" in str(caught.value)
    bank.load("first", whole / "first")
    bank.add("second", inlay.LoRA(r=2))
    with pytest.raises(FormatError, match="'second' is LoRA, no bottleneck alone"):
        bank.load("f", alone)
    bank.remove("second")
    bank.load("second", whole / "second")
    bank.load("f", alone)
    assert bank.adapters["f"].uses == {"first", "second"}
    bank.set("f")
    torch.testing.assert_close(
        bank.model(**inputs_of("llama")).logits, SavedSetup("setups_llama", "dynamic").logits, rtol=0, atol=2e-5
    )
    bank.load("whole", whole)  # which has its own
    inside = {str(whole / "first"), str(whole / "second")}
    assert bank.adapters["whole"].uses == inside
    bank.load("twice", whole)
    assert bank.adapters["twice"].uses == inside
    with torch.no_grad():
        next(bank.parameters(str(whole / "second"))).add_(1)
    with pytest.raises(UsageError, match="second' of the bank is not what its folder holds"):
        bank.load("thrice", whole)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(config="dynamic"),
        lambda config: config.pop("adapter_names"),
        lambda config: config.update(adapter_names="first,second"),
        lambda config: config["config"].pop("dropout_prob"),
    ],
)
def test_what_older_releases_wrote_means_the_same(edit, tmp_path):
    whole, alone, bank = saved_setup(tmp_path, edit=edit)
    alone.rename(whole / "called_otherwise")
    (whole / "a").mkdir()  # another fusion in the same folder
    (whole / "a" / "adapter_fusion_config.json").write_text(json.dumps({"name": "third,fourth"}))
    bank.load("f", whole)
    bank.set("f")
    expected = SavedSetup("setups_llama", "dynamic").logits
    torch.testing.assert_close(bank.model(**inputs_of("llama")).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config: config["config"].update(temperature=True), "a temperature, which falls with each forward"),
        (lambda config: config["config"].update(anew=1), "sets anew to 1"),
        (lambda config: config["config"].pop("key"), "no true or false for 'key'"),
        (lambda config: config.update(config=None), "holds no settings"),
        (lambda config: config.pop("name"), "holds no name"),
        (lambda config: config.update(adapter_names=[1, 2]), "names no adapters"),
        (lambda config: config.update(adapter_names=["first", "third"]), "holds no fusion over 'first' and 'second'"),
        (lambda config: config["config"].update(value=False), "value.weight, of no use"),
        (lambda config: config["config"].update(dropout_prob=2.0), "dropout"),
    ],
)
def test_a_fusions_config_that_is_wrong_is_refused_and_leaves_nothing(edit, said, tmp_path):
    whole, _, bank = saved_setup(tmp_path, edit=edit)
    with pytest.raises(FormatError) as caught:
        bank.load("f", whole)
    assert said in str(caught.value) and not bank.adapters


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ({"type": "Stack", "children": []}, "setup of the type 'Stack', which is no fusion"),
        ({"type": "Fuse", "children": [{"type": "Stack", "children": []}]}, "a fusion over more than adapters"),
        ({"type": "Fuse", "children": [{"type": "single", "children": ["../a"]}]}, "outside of it"),
        (None, "setup of the type None"),
    ],
)
def test_other_setups_are_refused_by_their_kind(setup, said, tmp_path):
    whole, _, bank = saved_setup(tmp_path)
    (whole / "adapter_setup.json").write_text(json.dumps({"adapter_setup": setup}))
    with pytest.raises(FormatError) as caught:
        bank.load("f", whole)
    assert said in str(caught.value)


def test_what_is_missing_or_of_another_place_is_named(tmp_path):
    whole, alone, bank = saved_setup(tmp_path)
    file = alone / "pytorch_model_adapter_fusion.bin"
    stored = torch.load(file)  # noqa: TID251
    more = {key.replace("first,second", "first,second2"): value for key, value in stored.items()}
    torch.save({**stored, **more}, file)  # AdapterHub saves those of a longer name too
    bank.load("f", whole)
    lacking = {key: value for key, value in stored.items() if ".layers.1." not in key}
    torch.save(lacking, file)
    with pytest.raises(FormatError, match=r"lacks the fusion behind the mlp of model\.layers\.1"):
        bank.load("g", whole)
    torch.save({key.replace(".layers.1.", ".layers.7."): value for key, value in stored.items()}, file)
    with pytest.raises(FormatError, match=r"a fusion at model\.layers\.7"):
        bank.load("g", whole)
    file.unlink()
    with pytest.raises(UsageError, match="holds no model_adapter_fusion"):
        bank.load("g", whole)


def test_the_head_beside_a_fusion_is_read(tmp_path):
    whole, alone, bank = saved_setup(tmp_path)
    weight = bank.model.lm_head.weight.detach()
    (alone / "head_config.json").write_text(json.dumps({"config": None, "name": "first,second"}))
    torch.save({"lm_head.weight": weight * 2}, alone / "pytorch_model_head.bin")
    bank.load("f", whole)
    bank.set("f")
    expected = SavedSetup("setups_llama", "dynamic").logits * 2
    torch.testing.assert_close(bank.model(**inputs_of("llama")).logits, expected, rtol=0, atol=4e-5)
    with pytest.raises(UsageError, match="AdapterHub has no place for"):
        bank.save("f", tmp_path / "out", format="adapterhub")


OTHERS = {
    "is parallel": {"a": inlay.Parallel(reduction_factor=4), "b": inlay.Parallel(reduction_factor=4)},
    "do not read the same": {"a": inlay.Pfeiffer(), "b": inlay.Pfeiffer(original_ln_before=False)},
    "do not act on the same sublayers": {"a": inlay.Pfeiffer(), "b": inlay.Pfeiffer(leave_out=[0])},
    "has a gate": {"a": inlay.Pfeiffer(), "b": inlay.Pfeiffer(use_gating=True)},
    "has a norm behind it": {"a": inlay.Pfeiffer(ln_after=True), "b": inlay.Pfeiffer()},
    "does not just add": {"a": inlay.Pfeiffer(), "b": inlay.Pfeiffer(residual_before_ln=False)},
}


@pytest.mark.parametrize("said", list(OTHERS))
def test_what_adapterhubs_fusion_does_otherwise_goes_neither_way(said, tmp_path):
    _, alone, bank = saved_setup(tmp_path)
    for (name, method), theirs in zip(OTHERS[said].items(), ("first", "second"), strict=True):
        bank.add(name, method)
        bank.add(theirs, method)
    bank.add("f", inlay.Fusion(adapters=["a", "b"]))
    with pytest.raises(UsageError, match=said):
        bank.save("f", tmp_path / "out", format="adapterhub")
    with pytest.raises(FormatError, match=said):
        bank.load("theirs", alone)
    assert not (tmp_path / "out").exists()


def test_a_fusion_that_adapterhub_has_no_place_for_is_not_written(tmp_path):
    bank = inlay.attach(base_of("llama"))
    for name in "abcd":
        bank.add(name, (inlay.Pfeiffer if name in "ab" else inlay.Houlsby)(reduction_factor=4))
    bank.add("f", inlay.Fusion(adapters=["a", "b"]))
    path = next(iter(bank.adapters["a"].sites))
    wrong = {
        "at some of the sublayers": inlay.Fusion(adapters=["a", "b"], targets=[path]),
        "asks with the stream": inlay.Fusion(adapters=["c", "d"]),
        "'f' is AdapterFusion, no bottleneck alone": inlay.Fusion(adapters=["a", "f"]),
        "AdapterFusion and Norm tuning in one adapter": [inlay.Fusion(adapters=["a", "b"]), inlay.NormTuning()],
    }
    for number, (words, method) in enumerate(wrong.items()):
        bank.add(str(number), method)
        with pytest.raises(UsageError, match=words):
            bank.save(str(number), tmp_path / "out", format="adapterhub")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds another adapter"):
        bank.save("f", tmp_path / "held", format="adapterhub")
    assert not (tmp_path / "out").exists()


def test_adapters_of_folders_get_short_names_in_adapterhub(tmp_path):
    bank = banked()
    for name in "ab":
        bank.save(name, tmp_path / "v1" / f"{name}.1")
    folders = [str(tmp_path / "v1" / f"{name}.1") for name in "ab"]
    bank.add("g", inlay.Fusion(adapters=folders), seed=0)
    bank.save("g", tmp_path / "out", format="adapterhub")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a_1", "b_1", "a_1,b_1", "adapter_setup.json", "inlay.json",
    }  # fmt: skip
    bank.load("again", tmp_path / "out")
    with bank.route(["g"]):
        expected = bank.model(input_ids=IDS[:1]).logits
    with bank.route(["again"]):
        torch.testing.assert_close(bank.model(input_ids=IDS[:1]).logits, expected, **EXACT)


def test_the_commands_take_a_fusion_with_its_adapters(tmp_path):
    whole, alone, bank = saved_setup(tmp_path / "hub")
    base = bank.model.float()
    bank.detach()
    base.save_pretrained(tmp_path / "base")

    def ran(adapter, to, out):
        given = ["--adapter", adapter, "--to", to, "--base", tmp_path / "base", "--out", tmp_path / out, "--json"]
        return CliRunner().invoke(app, ["convert", *map(str, given)])

    done = ran(whole, "adapterhub", "ours")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["max_difference"] < 1e-5 < found["largest_logit"]
    assert (tmp_path / "ours" / "first,second" / "adapter_fusion_config.json").is_file()
    again = inlay.attach(base_of("llama"))
    again.load("f", tmp_path / "ours")
    again.set("f")
    expected = SavedSetup("setups_llama", "dynamic").logits
    torch.testing.assert_close(again.model(**inputs_of("llama")).logits, expected, rtol=0, atol=2e-5)
    for adapter, to, said in [
        (whole, "peft", "HF PEFT has no AdapterFusion"),
        (whole, "lora", "AdapterFusion"),
        (alone, "adapterhub", "Commands take the folder of AdapterHub's save_adapter_setup"),
    ]:
        done = ran(adapter, to, "out")
        assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
        assert not (tmp_path / "out").exists()


def banked():
    bank = inlay.attach(make("llama"))
    for name, factor in (("a", 4), ("b", 8)):
        bank.add(name, inlay.Pfeiffer(reduction_factor=factor), seed=1)
    bank.add("f", inlay.Fusion(adapters=["a", "b"]), seed=2)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return bank


def test_its_rows_are_right_beside_others_and_where_text_is_written():
    bank = banked()
    rows = [None, "f", "a", ["b", "f"], {"f": 0.5, "a": 1.0}]
    ids = IDS[[0, 1, 2, 0, 1]]
    with bank.route(rows):
        together = bank.model(input_ids=ids).logits
    with bank.stream([(row, 6) for row in rows]):
        packed = bank.model(input_ids=ids.reshape(1, -1)).logits
    for number, row in enumerate(rows):
        with bank.route([row]):
            alone = bank.model(input_ids=ids[number : number + 1]).logits
            written = bank.model.generate(input_ids=ids[number : number + 1], max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(together[number : number + 1], alone, **EXACT)
        torch.testing.assert_close(packed[:, 6 * number : 6 * number + 6], alone, **EXACT)
        with bank.route([row, None]):
            beside = bank.model.generate(input_ids=ids[[number, 0]], max_new_tokens=4, do_sample=False)
        assert torch.equal(beside[:1], written)


def test_a_diverged_adapter_poisons_what_is_over_it_alone():
    bank = banked()
    bank.add("c", inlay.Pfeiffer(reduction_factor=8), seed=4)
    with torch.no_grad():
        next(bank.parameters("a")).fill_(float("nan"))
    with bank.route(["f", "b", "c"]):
        logits = bank.model(input_ids=IDS).logits
    assert logits[0].isnan().any() and not logits[1:].isnan().any()


def test_it_trains_in_the_one_loop_and_the_adapters_stay():
    def trained():
        bank = banked()
        bank.remove("f")
        before = [p.detach().clone() for name in "ab" for p in bank.parameters(name)]
        plans = [Plan("g", inlay.Fusion(adapters=["a", "b"]), lr=3e-2, batch_size=4, steps=24, seed=5)]
        losses = []
        for stepped in train_steps(bank, add_learners(bank, plans, 24), examples(), TokenBudget(64)):
            losses += [learner.loss for learner in stepped]
        assert all(
            torch.equal(*pair) for pair in zip(before, (p for n in "ab" for p in bank.parameters(n)), strict=True)
        )
        return losses, list(bank.parameters("g"))

    losses, parameters = trained()
    again, same = trained()
    assert losses == again and all(torch.equal(*pair) for pair in zip(parameters, same, strict=True))
    assert sum(losses[12:]) < sum(losses[:12])


def test_it_is_saved_over_names_or_folders_and_keeps_its_adapters(tmp_path):
    bank = banked()
    bank.set("f")
    expected = bank.model(input_ids=IDS).logits
    for name in bank.adapters:
        bank.save(name, tmp_path / name)
    bank.set(None)
    with pytest.raises(UsageError, match="'a' is used by 'f'"):
        bank.remove("a")
    bank.remove("f")
    bank.remove("a")
    with pytest.raises(UsageError, match="no adapter is called 'a'"):
        bank.load("f", tmp_path / "f")
    bank.load("a", tmp_path / "a")
    bank.load("f", tmp_path / "f")
    bank.set("f")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)
    other = inlay.attach(make("llama"))
    folders = [str(tmp_path / name) for name in "ab"]
    other.add("f", inlay.Fusion(adapters=folders), seed=0)
    assert other.adapters.keys() == {*folders, "f"}
    other.save("f", tmp_path / "g")
    third = inlay.attach(make("llama"))
    third.load("f", tmp_path / "g")
    assert third.adapters.keys() == other.adapters.keys()
    with pytest.raises(UsageError, match="no adapter is called 'nobody'"):
        third.add("h", inlay.Fusion(adapters=[str(tmp_path / "f"), "nobody"]))
    assert third.adapters.keys() == other.adapters.keys()  # nothing was loaded


def test_what_it_cannot_be_over_is_refused_by_name():
    bank = banked()
    bank.add("lora", inlay.LoRA(r=2))
    wrong = {
        "not two adapters": inlay.Fusion(adapters=["a"]),
        "no adapter is called 'nobody'": inlay.Fusion(adapters=["a", "nobody"]),
        "which is no sublayer": inlay.Fusion(adapters=["a", "lora"]),
        "acts at model.layers.0.self_attn.o_proj": inlay.Fusion(
            adapters=["a", "b"], targets=["model.layers.0.self_attn.o_proj"]
        ),
    }
    for words, method in wrong.items():
        with pytest.raises(UsageError) as caught:
            bank.add("new", method)
        assert words in str(caught.value) and "new" not in bank.adapters
    with pytest.raises(UsageError, match="cannot be merged"):
        bank.merge("f")


def test_a_run_over_folders_resumes_byte_for_byte(base_folder, reviews, tmp_path):  # noqa: F811
    bank = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    for number, name in enumerate("ab"):
        bank.add(name, inlay.Pfeiffer(reduction_factor=4), seed=number)
        bank.save(name, tmp_path / name)
    given = {"adapters": [str(tmp_path / name) for name in "ab"]}
    more = {"method": "fusion", "set": given, "steps": 4, "eval_every": 4}
    run(settings(base_folder, reviews, tmp_path / "whole", **more), on_message=lambda line: None)
    broken_off(base_folder, reviews, tmp_path / "cut", after=2, **more)
    run(settings(base_folder, reviews, tmp_path / "cut", resume=True, **more), on_message=lambda line: None)
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    other = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    other.load("f", tmp_path / "cut")
    assert set(other.adapters) == {*given["adapters"], "f"}


def test_a_run_goes_on_from_adapterhubs_folder(base_folder, reviews, tmp_path):  # noqa: F811
    bank = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    for number, name in enumerate("ab"):
        bank.add(name, inlay.Pfeiffer(reduction_factor=4), seed=number)
    bank.add("f", inlay.Fusion(adapters=["a", "b"]), seed=2)
    bank.save("f", tmp_path / "hub", format="adapterhub")
    given = {"init_from": str(tmp_path / "hub"), "method": USUAL, "set": {}, "steps": 2, "eval_every": 2}
    run(settings(base_folder, reviews, tmp_path / "out", **given), on_message=lambda line: None)
    other = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    other.load("g", tmp_path / "out")
    assert other.adapters["g"].uses == {str(tmp_path / "hub" / name) for name in "ab"}
    pairs = zip(bank.parameters("f"), other.parameters("g"), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)

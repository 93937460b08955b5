"""Laws 1 and 2 for a batch that mixes every method, in both call forms, with left and right padding."""

from __future__ import annotations

import peft
import pytest
import torch

import inlay
from inlay.errors import UsageError
from inlay.methods.table import METHODS
from zoo import ZOO, make

EXACT = {"rtol": 0, "atol": 1e-9}
WISHES = {
    "small": lambda: inlay.LoRA(r=4),
    "wide": lambda: inlay.LoRA(r=32, targets="all-linear", layers=[0], use_rslora=True),
    "inside": lambda: inlay.LoRA(r=2, init="pissa"),
    "lora_fa": lambda: inlay.LoRAFA(r=3),
    "lora_bias": lambda: inlay.LoRABias(r=2),
    "merged_lora": lambda: inlay.MergedLoRA(r=2, enable_lora=[True, False], targets="all-linear"),
    "adalora": lambda: inlay.AdaLoRA(init_r=3, target_r=2),
    "alora": lambda: inlay.ALoRA(r=2, alora_invocation_tokens=[5]),
    "dora": lambda: inlay.DoRA(r=3),
    "vera": lambda: inlay.VeRA(r=8),
    "bitfit": lambda: inlay.BitFit(add_bias=True),
    "loha": lambda: inlay.LoHa(r=2),
    "lokr": lambda: inlay.LoKr(r=2),
    "miss": lambda: inlay.MiSS(r=4),
    "oft": lambda: inlay.OFT(oft_block_size=4),
    "boft": lambda: inlay.BOFT(boft_block_size=4),
    "hra": lambda: inlay.HRA(r=2),
    "hira": lambda: inlay.HiRA(r=2),
    "road": lambda: inlay.RoAd(group_size=4),
    "randlora": lambda: inlay.RandLoRA(r=4),
    "pvera": lambda: inlay.PVeRA(r=4),
    "c3a": lambda: inlay.C3A(block_size=4),
    "gralora": lambda: inlay.GraLoRA(r=4),
    "shira": lambda: inlay.SHiRA(r=1),
    "ia3": lambda: inlay.IA3(),
    "norm": lambda: inlay.NormTuning(),
    "selective": lambda: inlay.Selective(select="attention of first 1; norms; heads 0,1 of last 1"),
    "tokens": lambda: inlay.TrainableTokens(token_indices=[*range(3, 48)]),
    "full": lambda: inlay.Full(),
    "short": lambda: inlay.PrefixTuning(num_virtual_tokens=2),
    "long": lambda: inlay.PrefixTuning(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=6),
    "prompt": lambda: inlay.PromptTuning(num_virtual_tokens=3, init="vocab"),
    "gated_prefix": lambda: inlay.PrefixTuning(num_virtual_tokens=3, gated=True),
    "unmoved": lambda: inlay.UnmovedPrefix(num_virtual_tokens=4),
    "mlp": lambda: inlay.PTuning(num_virtual_tokens=2, encoder_hidden_size=4),
    "lstm": lambda: inlay.PTuning(2, "LSTM", encoder_hidden_size=3),
    "multitask": lambda: inlay.MultitaskPromptTuning(num_virtual_tokens=2, init="vocab", num_tasks=2, task=1),
    "llama_adapter": lambda: inlay.LlamaAdapter(adapter_len=2),
    "houlsby": lambda: METHODS["houlsby"](),
    "pfeiffer": lambda: METHODS["pfeiffer"](),
    "plus": lambda: inlay.AdapterPlus(reduction_factor=4),
    "compacter": lambda: inlay.Compacter(reduction_factor=4),
    "coupled": lambda: inlay.Invertible(),
    "glow": lambda: inlay.Invertible(inv_adapter="glow", non_linearity="tanh"),
    "gated": lambda: inlay.Pfeiffer(reduction_factor=4, use_gating=True, ln_before=True),
    "gated_lora": lambda: inlay.GatedLoRA(r=2),
    "unipelt": lambda: inlay.UniPELT(num_virtual_tokens=2, encoder_hidden_size=6, reduction_factor=4, r=2),
    "fusion": lambda: inlay.Fusion(adapters=["houlsby", "pfeiffer"]),
}
# Mamba's scan ignores padding because its first projection has no bias; one that is added makes padding a token.
INSTEAD = {
    ("mamba", "bitfit"): lambda: inlay.BitFit(add_bias=True, targets=["x_proj", "out_proj"]),
    ("mamba", "lora_bias"): lambda: inlay.LoRABias(r=2, targets=["x_proj", "out_proj"]),
    ("mamba", "merged_lora"): lambda: inlay.MergedLoRA(r=2, enable_lora=[True, False], targets=["in_proj", "out_proj"]),
    # Blocks and pairs that do not divide the nine features of its second projection.
    ("mamba", "road"): lambda: inlay.RoAd(group_size=4, targets=["in_proj", "out_proj"]),
    ("mamba", "c3a"): lambda: inlay.C3A(block_size=4, targets=["in_proj", "out_proj"]),
    ("mamba", "gated_lora"): lambda: inlay.GatedLoRA(r=2, targets="all-linear"),
    ("mamba", "gralora"): lambda: inlay.GraLoRA(r=4, targets=["in_proj", "out_proj"]),
    # Attention that is the base's own, or holds a table of distances; none at all.
    ("bloom", "selective"): lambda: inlay.Selective(select="attention of first 1; norms"),
    ("t5", "selective"): lambda: inlay.Selective(select="mlp of first 1; norms"),
    ("mamba", "selective"): lambda: inlay.Selective(select="norms"),
    # Tables of positions are looked up for all rows at once; others hold parameters of other kinds.
    **{
        (name, "full"): lambda: inlay.Full(targets="all-linear")
        for name in ("gpt2", "opt", "bert", "roberta", "t5", "vit", "mamba", "qwen3_moe", "deepseek_v3")
    },
}
REFUSED = {
    "mamba": {"short", "long", "unmoved", "gated_prefix", "llama_adapter", "unipelt"},
    "t5": {"unmoved", "unipelt", "alora"},
    "vit": {"alora", "tokens", "prompt", "mlp", "lstm", "multitask"},
    **{name: {"llama_adapter"} for name in ("phi3", "gpt_neox")},
    "bloom": {"unmoved", "llama_adapter", "unipelt"},
}
# BLOOM's softmax is always float32 and turns float64's mask values into infinity, so that padding in front of a row
# gives NaN in the plain model already: there it is tried in float32.
LOOSE = {"rtol": 1e-4, "atol": 1e-4}


def bank_of(name, dtype=torch.float64, device="cpu"):
    """A base with one adapter of every method that applies; those that do not apply say why."""
    bank = inlay.attach(make(name, dtype=dtype).to(device))
    for wish, method in WISHES.items():
        if wish in ("houlsby", "pfeiffer") and wish not in METHODS:
            continue
        if wish in REFUSED.get(name, ()):
            with pytest.raises(UsageError):
                bank.add(wish, method(), seed=1)
        else:
            bank.add(wish, INSTEAD.get((name, wish), method)(), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return bank


def rows_of(bank):
    rows = [None, *bank.adapters, ["small", "norm"], {"small": 0.5, "wide": 2.0}]
    rows += [["dora", "vera", "bitfit"], {"dora": 0.5, "vera": 2.0, "bitfit": -1.0}]
    return rows + ([["prompt", "short", "ia3"]] if "short" in bank.adapters and "prompt" in bank.adapters else [])


def lengths_of(rows):
    return [4 + i % 3 for i in range(len(rows))]


def ids_of(rows):
    torch.manual_seed(1)
    pieces = [torch.randint(3, 48, (1, n)) for n in lengths_of(rows)]
    for piece in pieces:
        piece[0, 1] = 5  # which switches aLoRA on
    return pieces


def run(bank, name, ids, mask=None):
    if name == "vit":
        return bank.model(pixel_values=ids).logits
    more = {"decoder_input_ids": ids.flip(1)} if name == "t5" else {}
    return bank.model(input_ids=ids, attention_mask=mask, **more).logits


def padded(pieces, side):
    longest = max(p.shape[1] for p in pieces)
    ids, mask = torch.zeros(len(pieces), longest, dtype=torch.long), torch.zeros(len(pieces), longest, dtype=torch.long)
    for row, piece in enumerate(pieces):
        n = piece.shape[1]
        span = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[row, span], mask[row, span] = piece[0], 1
    return ids, mask


def gradients(loss, parameters):
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def same(dtype):
    return LOOSE if dtype == torch.float32 else EXACT


def same_gradients(ours, expected, dtype=torch.float64):
    """Norms and softmaxes compute in float32 in some bases: gradients carry its noise."""
    for a, b in zip(ours, expected, strict=True):
        bound = 1e-3 if dtype == torch.float32 else 1e-7
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * max(1.0, float(b.abs().max())))


def acts(bank, name, row, alone, base):
    """Every adapter changes its row, or the comparison would prove nothing."""
    assert row is None or not torch.allclose(alone, base, atol=1e-4), row


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", list(ZOO))
def test_a_padded_row_never_sees_its_neighbours(name, side):
    if side != "none" and name in ("vit", "t5", "mamba"):
        pytest.skip("images have no padding; the decoder here takes none; a scan's own padding is not neutral")
    bank = bank_of(name, torch.float32 if name == "bloom" and side == "left" else torch.float64)
    rows, parameters = rows_of(bank), list(bank.parameters())
    if name == "vit":
        pieces = list(torch.randn(len(rows), 1, 3, 8, 8, dtype=torch.float64))
        ids, mask = torch.cat(pieces), None
    elif side == "none":
        pieces = [piece[:, :4] for piece in ids_of(rows)]
        ids, mask = torch.cat(pieces), None
    else:
        pieces = ids_of(rows)
        ids, mask = padded(pieces, side)
    with bank.route(rows):
        together = run(bank, name, ids, mask)
    totals, loss = None, 0.0
    for number, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
        with bank.route([row]):
            # A base row's positions under left padding are the base's own affair: it is compared as it is padded.
            alone_mask = None if mask is None else mask[number : number + 1]
            if (row is None and side == "left") or (side == "left" and not touches_positions(bank, row)):
                alone = run(bank, name, ids[number : number + 1], alone_mask)[:, -piece.shape[1] :]
            else:
                alone = run(bank, name, piece)
        ours = together[number : number + 1]
        if side != "none" and name != "vit":
            n = piece.shape[1]
            ours = ours[:, -n:] if side == "left" else ours[:, :n]
        assert not alone.isnan().any()
        acts(bank, name, row, alone, run(bank, name, piece))
        near = same(ours.dtype)
        if name == "bloom":  # whose softmax is float32's over a float64 base too
            near = {**near, "atol": max(near["atol"], 1e-6)}
        torch.testing.assert_close(ours, alone, **near)
        if alone.requires_grad:
            grads = gradients(alone.square().sum(), parameters)
            totals = grads if totals is None else [a + b for a, b in zip(totals, grads, strict=True)]
            loss = loss + ours.square().sum()
    same_gradients(gradients(loss, parameters), totals, torch.float32 if name == "bloom" else ours.dtype)


def touches_positions(bank, row):
    names = [row] if isinstance(row, str) else list(row or ())
    methods = [bank.adapters[n].method for n in names]
    return any((m.prefix_length and m.moves_positions) or m.virtual_length for m in methods)


PACKS = [name for name in ZOO if name not in ("bloom", "t5", "vit", "mamba", "roberta")] + ["roberta"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(ZOO))
def test_which_bases_keep_packed_segments_apart(name, dtype):
    bank = inlay.attach(make(name).to(dtype))
    assert bank.packs == (name in PACKS)
    if not bank.packs:
        with pytest.raises(UsageError, match="route"), bank.stream([(None, 3)]):
            pass


@pytest.mark.parametrize("name", PACKS)
def test_a_packed_segment_never_sees_its_neighbours(name):
    bank = bank_of(name)
    rows, parameters = rows_of(bank), list(bank.parameters())
    pieces = ids_of(rows)
    pieces[1] = torch.randint(3, 48, (1, 29))  # so long that attention takes it in a block of its own
    with bank.stream([(row, p.shape[1]) for row, p in zip(rows, pieces, strict=True)]):
        together = run(bank, name, torch.cat(pieces, 1))
    start, loss, totals = 0, 0.0, None
    for row, piece in zip(rows, pieces, strict=True):
        with bank.route([row]):
            alone = run(bank, name, piece)
        acts(bank, name, row, alone, run(bank, name, piece))
        ours = together[:, start : start + piece.shape[1]]
        torch.testing.assert_close(ours, alone, **EXACT)
        start += piece.shape[1]
        if alone.requires_grad:
            grads = gradients(alone.square().sum(), parameters)
            totals = grads if totals is None else [a + b for a, b in zip(totals, grads, strict=True)]
            loss = loss + ours.square().sum()
    same_gradients(gradients(loss, parameters), totals, ours.dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_a_diverged_neighbour_poisons_nobody(name, form):
    bank = bank_of(name)
    sick_names = {"small", "short", "prompt"}
    rows = [row for row in rows_of(bank) if row is None or isinstance(row, str)] + [["wide", "norm"]]
    pieces = [p[:, :4] for p in ids_of(rows)]

    def logits():
        if form == "packed":
            with bank.stream([(row, 4) for row in rows]):
                return run(bank, name, torch.cat(pieces, 1))[0].unflatten(0, (len(rows), 4))
        with bank.route(rows):
            return run(bank, name, torch.cat(pieces))

    healthy = logits()
    with torch.no_grad():
        for sick in sick_names:
            for parameter in bank.parameters(sick):
                parameter.fill_(float("nan"))
    poisoned = logits()
    for number, row in enumerate(rows):
        names = {row} if isinstance(row, str) else set(row or ())
        if names & sick_names:
            assert poisoned[number].isnan().any()
        else:
            torch.testing.assert_close(poisoned[number], healthy[number], **EXACT)
    well = [p for other in bank.adapters if other not in sick_names for p in bank.parameters(other)]
    kept = [
        n
        for n, row in enumerate(rows)
        if row is not None and not ({row} if isinstance(row, str) else set(row)) & sick_names
    ]
    grads = torch.autograd.grad(sum(poisoned[n].sum() for n in kept), well, allow_unused=True)
    assert not any(g is not None and g.isnan().any() for g in grads)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    bank = bank_of(name)
    rows, parameters = rows_of(bank), list(bank.parameters())
    ids = torch.cat([p[:, :4] for p in ids_of(rows)])

    def grads():
        for parameter in parameters:
            parameter.grad = None
        torch.manual_seed(0)  # some of the adapters draw dropout
        with bank.route(rows):
            run(bank, name, ids).square().sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    bank.model.train()
    plain = grads()
    bank.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    bank.model.enable_input_require_grads()
    same_gradients(grads(), plain)
    bank.model.gradient_checkpointing_disable()


THEIRS = {
    "short": lambda n: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "projected": lambda n: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "prompt": lambda n: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", list(THEIRS))
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "t5"]
)
def test_virtual_tokens_have_the_reference_logits_both_ways(name, kind, tmp_path):
    config = THEIRS[kind](name)
    if name == "t5":
        config.task_type = "SEQ_2_SEQ_LM"
    reference = peft.get_peft_model(make(name), config)
    reference.double()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.copy_((torch.randn_like(parameter) * 0.5).float())
    reference.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(6)
    ids = torch.randint(3, 48, (2, 7))
    more = {"decoder_input_ids": ids.flip(1)[:, :5]} if name == "t5" else {}
    expected = reference.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[:, -ids.shape[1] :]
    bank = inlay.attach(make(name))
    bank.load("a", tmp_path / "theirs")
    plain = bank.model(input_ids=ids, **more).logits
    bank.set("a")
    ours = bank.model(input_ids=ids, **more).logits
    assert ours.shape == plain.shape and (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, **EXACT)
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval().double()
    again = back(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[:, -ids.shape[1] :]
    # The reference holds virtual tokens in float32.
    torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3", "t5"])
def test_generation_equals_each_row_alone(name, beams):
    bank = bank_of(name, torch.float32 if name == "bloom" else torch.float64)
    rows = rows_of(bank)
    pieces = ids_of(rows)
    if name == "t5":
        pieces = [p[:, :4] for p in pieces]
    ids, mask = padded(pieces, "left")
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "min_new_tokens": 5}
    with bank.route(rows):
        together = bank.model.generate(input_ids=ids, attention_mask=mask, **settings)
    for number, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
        with bank.route([row]):
            alone = bank.model.generate(input_ids=piece, attention_mask=torch.ones_like(piece), **settings)
        assert torch.equal(together[number, -5:], alone[0, -5:]), row


def test_a_cache_of_another_route_is_refused():
    bank = bank_of("llama")
    ids = torch.randint(3, 48, (1, 4))
    with bank.route(["short"]):
        out = bank.model(input_ids=ids, use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache
    with bank.route(["small"]), pytest.raises(UsageError, match="another route"):
        bank.model(input_ids=ids[:, :1], past_key_values=cache)
    with bank.route(["short"]):
        bank.model(input_ids=ids[:, :1], past_key_values=cache)


def test_two_models_share_a_configuration_unharmed():
    config = make("llama").config
    models = [type(make("llama"))(config).double().eval() for _ in range(2)]
    ids = torch.randint(3, 48, (1, 4))
    before = models[1](input_ids=ids).logits
    bank = inlay.attach(models[0])
    bank.add("p", inlay.PrefixTuning(num_virtual_tokens=2), seed=1)
    bank.set("p")
    models[0](input_ids=ids)
    assert torch.equal(models[1](input_ids=ids).logits, before)
    assert config._attn_implementation == "sdpa"


SCALED, NORMS = ["k_proj", "v_proj", "down_proj"], ["input_layernorm", "norm"]
GRADS = {
    "ia3": (lambda _: peft.IA3Config(target_modules=SCALED, feedforward_modules=["down_proj"]), inlay.IA3()),
    "norm": (lambda _: peft.LNTuningConfig(target_modules=NORMS), inlay.NormTuning(targets=NORMS)),
    "prefix": (THEIRS["short"], inlay.PrefixTuning(num_virtual_tokens=3)),
    "projected": (THEIRS["projected"], inlay.PrefixTuning(3, prefix_projection=True, encoder_hidden_size=8)),
    "prompt": (THEIRS["prompt"], inlay.PromptTuning(num_virtual_tokens=3)),
}
ENDS = {
    "l": "ia3_l", "weight": "ln_tuning_layers.default.weight", "prefix": "embedding.weight",
    "prompt": "embedding.weight",
    "embedding": "embedding.weight", "w1": "transform.0.weight", "b1": "transform.0.bias", "w2": "transform.2.weight",
    "b2": "transform.2.bias",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(GRADS))
def test_gradients_are_those_of_the_reference(kind):
    config, method = GRADS[kind]
    reference = peft.get_peft_model(make("llama"), config("llama"))
    reference.double()
    bank = inlay.attach(make("llama"))
    adapter = bank.add("a", method, seed=1)
    theirs, pairs = dict(reference.named_parameters()), []
    torch.manual_seed(5)
    for path, params in adapter.params.items():
        for name, value in params.items():
            found = [p for key, p in theirs.items() if ENDS[name] in key and (path in key or not path)]
            assert len(found) == 1
            with torch.no_grad():
                value.add_(torch.randn_like(value) * 0.2)
                found[0].copy_(value.reshape(found[0].shape))
            pairs.append((value, found[0]))
    ids = torch.randint(3, 48, (2, 7))
    bank.set("a")
    ours = bank.model(input_ids=ids).logits
    expected = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -7:]
    torch.testing.assert_close(ours, expected, **EXACT)
    ours.square().sum().backward()
    expected.square().sum().backward()
    same_gradients([a.grad.reshape(b.shape) for a, b in pairs], [b.grad for _, b in pairs])


def test_a_prompt_starts_from_words_or_at_random(tokenizer, base_folder):
    import transformers as tf

    bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))
    table = bank.model.get_input_embeddings().weight
    method = inlay.PromptTuning(num_virtual_tokens=6, init_text="good film").with_tokenizer(tokenizer)
    ids = tokenizer("good film")["input_ids"]
    words = bank.add("words", method, seed=1).params[""]["prompt"]
    torch.testing.assert_close(words, table[(ids * 6)[:6]])
    with pytest.raises(UsageError, match="init_ids"):
        bank.add("unprepared", inlay.PromptTuning(init_text="good film"))
    random = [bank.add(f"r{n}", inlay.PromptTuning(num_virtual_tokens=6), seed=n).params[""]["prompt"] for n in (1, 2)]
    assert not torch.equal(*random) and 0.5 < float(random[0].detach().std() / table.std()) < 2
    sampled = bank.add("vocab", inlay.PromptTuning(num_virtual_tokens=3, init="vocab"), seed=1).params[""]["prompt"]
    assert all((row == table).all(1).any() for row in sampled)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_method_merges_into_half_precision_or_says_why(name):
    for wish, method in WISHES.items():
        made = INSTEAD.get((name, wish), method)()
        if wish in REFUSED.get(name, ()) or getattr(made, "uses", ()):
            continue
        bank = inlay.attach(make(name, dtype=torch.bfloat16))
        bank.add(wish, made, seed=1)
        ids = ids_of([None])[0]
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            with bank.route([wish]):
                routed = run(bank, name, ids).float()
        try:
            bank.merge(wish)
        except UsageError:
            continue
        finally:
            bank.detach()
        with torch.no_grad():
            merged = bank.model(input_ids=ids).logits.float()
        assert (merged - routed).norm() / routed.norm() < 0.1, wish

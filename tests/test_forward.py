"""One forward knows one thing: threads, tasks, generators, copies, interruptions and caches."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import torch
import transformers as tf
from transformers.masking_utils import AttentionMaskInterface

import inlay
from inlay.bank.hooks import Hook
from inlay.batch.forward import FORWARD, IN_MODEL, Forward
from inlay.errors import UsageError
from inlay.kernels.standin import StandIn
from inlay.sites import attention
from inlay.sites.attention import HANDLER
from inlay.sites.uncompiled import Uncompiled
from zoo import make

METHODS = {
    "lora": lambda: inlay.LoRA(r=2, targets="all-linear"), "prefix": lambda: inlay.PrefixTuning(num_virtual_tokens=2),
    "prompt": lambda: inlay.PromptTuning(num_virtual_tokens=3), "ia3": lambda: inlay.IA3(),
    "houlsby": lambda: inlay.Houlsby(),
}  # fmt: skip
WITHOUT_ATTENTION = ("prefix", "prompt")
EXACT = {"rtol": 0, "atol": 1e-12}


def filled(model, without=()):
    """A bank with one adapter of each kind, away from its start."""
    return fill(inlay.attach(model), without)


def fill(bank, without=()):
    for number, (name, method) in enumerate(METHODS.items()):
        if name not in without:
            bank.add(name, method(), seed=number)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return bank


@pytest.fixture
def bank():
    found = filled(make("llama"))
    yield found
    found.detach()
    assert_plain(found.model)


def tokens(rows=2, length=5, seed=0):
    return torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


IDS = tokens()
ROUTES = [["lora", "prefix"], ["prompt", None], ["ia3", "houlsby"], ["prefix", "prefix"], [None, "lora"]]


def logits(bank, row=None, ids=IDS):
    """What the base gives, under a route where one is given."""
    if row is None:
        return bank.model(input_ids=ids).logits
    with bank.route(row):
        return bank.model(input_ids=ids).logits


def written(bank, row, ids=IDS):
    with bank.route(row):
        return generated(bank.model, ids)


def generated(model, ids=IDS, **more):
    return model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **more)


def gradients(bank, row, backward=torch.Tensor.backward):
    for parameter in bank.parameters():
        parameter.grad = None
    backward(logits(bank, row).square().sum())
    return [None if p.grad is None else p.grad.clone() for p in bank.parameters()]


def assert_same(found, expected, **near):
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            torch.testing.assert_close(f, e, **(near or {"rtol": 0, "atol": 0}))


def in_thread(run, *args, **kwargs):
    """What `run` gives or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, *args, **kwargs).result()


def assert_plain(model, training=False):
    """Nothing of a bank is left on a model, nor in this context."""
    for path, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks, path
        assert "forward" not in vars(module) and module.training is training, path
        assert not getattr(module, "gradient_checkpointing", False), path
    assert all(p.requires_grad for p in model.parameters())
    assert model not in attention._watched
    gc.collect()
    if not list(attention._watched):  # models of other tests may live on
        now = tf.AttentionInterface.get_interface, AttentionMaskInterface.__getitem__
        assert now == (attention._interface, attention._mask_interface)
    assert FORWARD.get() is HANDLER.get() is IN_MODEL.get() is None


def checkpointing(model, what):
    """transformers' own switch, which newer releases call otherwise, and warn of the old name."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


# ---- threads, tasks, models


def test_threads_with_routes_of_their_own_are_right_bit_for_bit(bank):
    expected = {str(r): logits(bank, r).detach() for r in ROUTES}
    grads = gradients(bank, ["lora", "prefix"])
    words = {str(r): written(bank, r) for r in ROUTES}
    wrong = []

    def infer(number):
        for i in range(12):
            row = ROUTES[(number + i) % len(ROUTES)]
            with torch.no_grad():
                found = logits(bank, row)
            if not torch.equal(found, expected[str(row)]):
                wrong.append(row)
            if i % 4 == number and not torch.equal(written(bank, row), words[str(row)]):
                wrong.append(("generate", row))

    def train():
        for _ in range(12):
            for found, right in zip(gradients(bank, ["lora", "prefix"]), grads, strict=True):
                if right is not None and (found is None or not torch.equal(found, right)):
                    wrong.append("gradients")

    threads = [threading.Thread(target=t, args=a) for t, a in ((infer, (0,)), (infer, (1,)), (train, ()))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_tasks_have_routes_of_their_own(bank):
    async def one(row):
        with bank.route(row):
            found = []
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(bank.model(input_ids=IDS).logits)
        return found

    async def all_of_them():
        return await asyncio.gather(*(one(row) for row in ROUTES))

    for row, found in zip(ROUTES, asyncio.run(all_of_them()), strict=True):
        assert all(torch.equal(f, logits(bank, row)) for f in found)


def test_models_that_share_a_configuration_have_adapters_of_their_own(bank):
    other = type(bank.model)(bank.model.config).double().eval()
    other.load_state_dict(bank.model.state_dict())
    second = filled(other)
    for parameter in second.parameters():
        parameter.data.mul_(2)
    plain = logits(bank)
    with bank.route(["prefix", "lora"]):
        mine = bank.model(input_ids=IDS).logits
        assert torch.equal(second.model(input_ids=IDS).logits, plain)
        with second.route(["lora", "prefix"]):
            theirs = second.model(input_ids=IDS).logits
            assert torch.equal(bank.model(input_ids=IDS).logits, mine)
    assert torch.equal(logits(second, ["lora", "prefix"]), theirs)
    second.detach()
    assert torch.equal(logits(bank, ["prefix", "lora"]), mine)


def test_a_thread_without_a_route_is_refused_while_one_is_open(bank):
    plain, routed = logits(bank), logits(bank, ["prefix", "lora"])
    with bank.route(["prefix", "lora"]):
        with pytest.raises(UsageError, match="copy_context"):
            in_thread(bank.model, IDS)
        with pytest.raises(UsageError, match="copy_context"):
            in_thread(generated, bank.model)
        assert torch.equal(in_thread(contextvars.copy_context().run, bank.model, IDS).logits, routed)
        assert torch.equal(in_thread(logits, bank, [None]), plain)
        bank.set(None)
        assert torch.equal(in_thread(bank.model, IDS).logits, plain)
        bank.set("lora")
        assert torch.equal(in_thread(bank.model, IDS).logits, in_thread(logits, bank, ["lora"]))
        assert torch.equal(logits(bank), routed)
    assert torch.equal(logits(bank), logits(bank, ["lora"]))
    with bank.route([None, None]), bank.route([None]):
        pass


@pytest.mark.parametrize("by", ["copy", "set", "own", "to_thread"])
def test_a_streamer_inside_of_a_generator(bank, tokenizer, by):
    """What web servers do: one thread generates while a generator hands the words on."""
    ids, row = IDS[:1], ["lora"]
    expected = tokenizer.decode(written(bank, row, ids)[0])

    def own(**settings):
        with bank.route(row):
            bank.model.generate(**settings)

    def stream():
        words = tf.TextIteratorStreamer(tokenizer, timeout=60)
        settings = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "streamer": words}
        with ExitStack() as stack:
            target, args = bank.model.generate, ()
            if by == "copy":
                stack.enter_context(bank.route(row))
                target, args = contextvars.copy_context().run, (bank.model.generate,)
            elif by == "set":
                bank.set("lora")
            else:
                target = own
            thread = threading.Thread(target=target, args=args, kwargs=settings)
            thread.start()
            yield from words
            thread.join()

    async def to_thread():
        with bank.route(row):
            made = await asyncio.to_thread(generated, bank.model, ids)
        yield tokenizer.decode(made[0])

    async def collect():
        return "".join([word async for word in to_thread()])

    assert (asyncio.run(collect()) if by == "to_thread" else "".join(stream())) == expected
    assert expected != tokenizer.decode(written(bank, [None], ids)[0])


def test_routes_of_the_plain_base_refuse_nobody(bank):
    plain = logits(bank)
    with bank.route([None, None]):
        assert torch.equal(in_thread(bank.model, IDS).logits, plain)


# ---- generators, tasks that outlive their routes, blocks out of order


def test_a_route_of_a_suspended_generator_is_not_its_consumers(bank):
    def stream():
        with bank.route(["lora", "prefix"]):
            for _ in range(3):
                yield bank.model(input_ids=IDS).logits

    generator = stream()
    assert torch.equal(next(generator), logits(bank, ["lora", "prefix"]))
    with pytest.raises(UsageError, match=r"generator .*stream"):
        logits(bank)
    assert torch.equal(next(generator), logits(bank, ["lora", "prefix"]))
    generator.close()
    assert torch.equal(logits(bank), logits(bank, [None]))


def test_a_generators_route_and_its_consumers_do_not_meet(bank):
    ours, theirs = logits(bank, ["prompt", None]), logits(bank, ["lora", "prefix"])

    def stream():
        with bank.route(["lora", "prefix"]):
            for _ in range(4):
                yield bank.model(input_ids=IDS).logits

    with bank.route(["prompt", None]):  # around the whole of it
        for found in stream():
            assert torch.equal(found, theirs)
            assert torch.equal(logits(bank), ours)
    generator = stream()
    next(generator)
    with bank.route(["prompt", None]):  # in its middle
        assert torch.equal(next(generator), theirs)
        assert torch.equal(logits(bank), ours)
        assert torch.equal(next(generator), theirs)
        list(generator)  # it ends inside of our block
        assert torch.equal(logits(bank), ours)
    assert torch.equal(logits(bank), logits(bank, [None]))


def test_an_async_generators_route_is_not_its_consumers(bank):
    theirs = logits(bank, ["lora", "prefix"])

    async def stream():
        with bank.route(["lora", "prefix"]):
            for _ in range(2):
                await asyncio.sleep(0)
                yield bank.model(input_ids=IDS).logits

    async def plain():
        return logits(bank)

    async def consume():
        generator = stream()
        async for found in generator:
            assert torch.equal(found, theirs)
            with pytest.raises(UsageError, match=r"generator .*stream"):
                logits(bank)
            with pytest.raises(UsageError, match=r"generator .*stream"):
                await asyncio.create_task(plain())
        return logits(bank)

    assert torch.equal(asyncio.run(consume()), logits(bank, [None]))


def test_context_managers_around_a_route_hold(bank):
    expected = logits(bank, ["lora", "prefix"])

    @contextmanager
    def routed():
        with bank.route(["lora", "prefix"]):
            yield

    @asynccontextmanager
    async def async_routed():
        with bank.route(["lora", "prefix"]):
            yield

    async def run():
        async with async_routed():
            return logits(bank)

    with routed():
        assert torch.equal(logits(bank), expected)
    with ExitStack() as stack:
        stack.enter_context(bank.route(["prompt", None]))
        stack.enter_context(routed())
        assert torch.equal(logits(bank), expected)
    assert torch.equal(asyncio.run(run()), expected)

    def stream():
        with routed():
            yield logits(bank)

    generator = stream()
    assert torch.equal(next(generator), expected)
    with pytest.raises(UsageError, match="stream"):
        logits(bank)
    generator.close()


@pytest.fixture
def routed(bank):
    with bank.route(["lora", "prefix"]):
        yield bank


def test_a_fixture_may_open_a_route_for_its_test(routed):
    found = logits(routed)
    with routed.route(["lora", "prefix"]):
        assert torch.equal(found, logits(routed))
    assert not torch.equal(found, logits(routed, [None]))


def test_a_task_that_outlives_its_route_is_refused(bank):
    async def later(gate):
        await gate.wait()
        return logits(bank)

    async def run():
        gate = asyncio.Event()
        with bank.route(["lora", "prefix"]):
            task = asyncio.create_task(later(gate))
            await asyncio.sleep(0)
        gate.set()
        await task

    with pytest.raises(UsageError, match=r"closed.*Open a route in the task"):
        asyncio.run(run())


def test_blocks_end_in_order_and_once(bank):
    first, second = bank.route(["lora", None]), bank.route(["prefix", None])
    first.__enter__()
    second.__enter__()
    with pytest.raises(UsageError, match="in order"):
        first.__exit__(None, None, None)
    assert torch.equal(logits(bank), logits(bank, ["prefix", None]))
    second.__exit__(None, None, None)
    assert torch.equal(logits(bank), logits(bank, [None]))
    with pytest.raises(UsageError, match="entered before"), first:
        pass
    twice = bank.route(["lora", None])
    with twice:
        with pytest.raises(UsageError, match="entered before"), twice:
            pass
        assert torch.equal(logits(bank), logits(bank, ["lora", None]))


def test_nested_routes_take_turns(bank):
    outer, inner = logits(bank, ["lora", None]), logits(bank, ["prefix", "prompt"])
    with bank.route(["lora", None]):
        with bank.route(["prefix", "prompt"]):
            assert torch.equal(logits(bank), inner)
        with pytest.raises(RuntimeError, match="mine"), bank.route(["prompt", None]):
            raise RuntimeError("mine")
        assert torch.equal(logits(bank), outer)


# ---- backward


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_backward_in_another_thread_is_right(bank, reentrant):
    row = ["lora", "prefix"]
    expected = {str(r): gradients(bank, r) for r in (row, ["ia3", "houlsby"])}
    checkpointing(bank.model, "enable")({"use_reentrant": reentrant})
    bank.model.train()
    for backward in (torch.Tensor.backward, lambda loss: in_thread(loss.backward)):
        for r in (row, ["ia3", "houlsby"]):
            assert_same(gradients(bank, r, backward), expected[str(r)], **EXACT)

    def elsewhere(loss):
        with bank.route(["prompt", "ia3"]):
            loss.backward()

    assert_same(gradients(bank, row, elsewhere), expected[str(row)], **EXACT)
    bank.model.eval()
    checkpointing(bank.model, "disable")()
    bank.model.disable_input_require_grads()  # which enabling has switched on


@pytest.mark.parametrize("recompute", [False, True])
def test_a_graph_serves_twice(bank, recompute):
    row = ["lora", "prefix"]
    expected = [None if g is None else 2 * g for g in gradients(bank, row)]

    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    with ExitStack() as stack:
        if recompute:
            stack.enter_context(bank.recomputing())
        assert_same(gradients(bank, row, twice), expected, **EXACT)


def test_recomputing_leaves_nothing_and_the_users_own_stays(bank):
    expected = gradients(bank, ["lora", "prefix"])
    for error in (None, RuntimeError, KeyboardInterrupt):
        with ExitStack() as stack:
            if error is not None:
                stack.enter_context(pytest.raises(error))
            with bank.recomputing():
                assert_same(gradients(bank, ["lora", "prefix"]), expected, **EXACT)
                if error is not None:
                    raise error
        assert not any(m.training for m in bank.model.modules())
        assert not any(getattr(m, "gradient_checkpointing", False) for m in bank.model.modules())
        assert not any("_gradient_checkpointing_func" in vars(m) for m in bank.model.modules())
    checkpointing(bank.model, "enable")({"use_reentrant": False})
    own = vars(block := bank.model.get_submodule("model.layers.0"))["_gradient_checkpointing_func"]
    with bank.recomputing():
        gradients(bank, ["lora", "prefix"])
    assert any(getattr(m, "gradient_checkpointing", False) for m in bank.model.modules())
    assert_same(gradients(bank, ["lora", "prefix"]), expected, **EXACT)
    found = vars(block)["_gradient_checkpointing_func"]
    assert getattr(found, "original", found) is own
    checkpointing(bank.model, "disable")()
    bank.model.disable_input_require_grads()


# ---- copies


def assert_a_plain_model(model, plain):
    assert torch.equal(model(input_ids=IDS).logits, plain)
    for module in model.modules():
        assert not isinstance(vars(module).get("forward"), StandIn)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not any(isinstance(hook, Hook) for hook in hooks)


@pytest.mark.parametrize("opened", [False, True])
def test_a_copy_is_a_plain_model(bank, opened):
    plain, routed, keys = logits(bank), logits(bank, ["lora", "prefix"]), list(bank.model.state_dict())
    gradients(bank, ["lora", "prefix"])  # with fused modules in place
    with ExitStack() as stack:
        if opened:
            stack.enter_context(bank.route(["lora", "prefix"]))
        made, inner = copy.deepcopy(bank.model), copy.deepcopy(bank.model.model)
        assert_a_plain_model(made, plain)
        assert torch.equal(made.lm_head(inner(input_ids=IDS).last_hidden_state), plain)
        file = io.BytesIO()
        torch.save(bank.model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)  # noqa: TID251 (our own, of this moment)
        assert_a_plain_model(loaded, plain)
        assert list(bank.model.state_dict()) == keys == list(made.state_dict())
        second = filled(made)
        assert torch.equal(logits(second, ["lora", "prefix"]), routed)
        second.detach()
        made.requires_grad_(True)
        made(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.sub_(parameter.grad)
    assert not torch.equal(made(input_ids=IDS).logits, plain)
    assert torch.equal(logits(bank), plain)
    assert torch.equal(logits(bank, ["lora", "prefix"]), routed)


def test_a_saved_model_opens_as_a_plain_one_in_a_new_process(bank, tmp_path):
    plain = logits(bank)
    gradients(bank, ["lora", "prefix"])
    with bank.route(["lora", "prefix"]):
        torch.save(bank.model, tmp_path / "model.pt")
        bank.model.save_pretrained(tmp_path / "saved")
    again = type(bank.model).from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert torch.equal(again(input_ids=IDS).logits, plain)
    torch.save((IDS, plain), tmp_path / "expected.pt")
    script = (
        "import sys, torch; f = sys.argv[1]; m = torch.load(f + '/model.pt', weights_only=False);"
        "ids, plain = torch.load(f + '/expected.pt'); assert torch.equal(m(input_ids=ids).logits, plain);"
        "import inlay; b = inlay.attach(m); b.add('x', inlay.LoRA()); b.detach(); print('plain')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "plain\n", done.stderr


# ---- interruptions


class Interrupting:
    """A user's own hook, which is interrupted at its `turn`-th call."""

    def __init__(self, module, turn=1):
        self.turn, self.handle = turn, module.register_forward_hook(self)

    def __call__(self, module, args, out):
        self.turn -= 1
        if self.turn == 0:
            raise KeyboardInterrupt
        return None


PLACES = ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp", "model.embed_tokens", "lm_head", "model.norm"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_interrupted_forward_leaves_nothing(place, checkpointed):
    bank = filled(make("llama"))
    expected, plain = logits(bank, ["prompt", "ia3"]), logits(bank)
    grads = gradients(bank, ["lora", "houlsby"])
    turns = 2 if checkpointed and place.endswith("o_proj") else 1  # the second time is inside of the backward
    with ExitStack() as stack:
        if checkpointed:
            stack.enter_context(bank.recomputing())
        hook = Interrupting(bank.model.get_submodule(place), turns)
        with pytest.raises(KeyboardInterrupt):
            gradients(bank, ["lora", "prefix"])
        hook.handle.remove()
        assert FORWARD.get() is HANDLER.get() is IN_MODEL.get() is None
        assert torch.equal(logits(bank, ["prompt", "ia3"]), expected)
        assert torch.equal(logits(bank), plain)
        assert_same(gradients(bank, ["lora", "houlsby"]), grads, **EXACT)
    hook = Interrupting(bank.model.get_submodule(place))
    with pytest.raises(KeyboardInterrupt):
        written(bank, ["prefix", "lora"])
    hook.handle.remove()
    bank.detach()
    assert_plain(bank.model)
    again = filled(bank.model)
    assert torch.equal(logits(again, ["prompt", "ia3"]), expected)
    again.detach()
    assert_plain(bank.model)


@pytest.mark.parametrize("done", [0, 1])
def test_interrupted_fusing_leaves_nothing(monkeypatch, done):
    bank = filled(make("llama"))
    expected = gradients(bank, ["lora", "prefix"])
    bank.detach()
    bank = filled(bank.model)
    make_one, left = StandIn.__init__, [done]

    def interrupted(self, *args):
        make_one(self, *args)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StandIn, "__init__", interrupted)
        gradients(bank, ["lora", "prefix"])
    assert_same(gradients(bank, ["lora", "prefix"]), expected)
    bank.detach()
    assert_plain(bank.model)


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_attach_leaves_nothing(place):
    model = make("llama")
    hook = Interrupting(model.get_submodule(place))
    with pytest.raises(KeyboardInterrupt):
        inlay.attach(model)
    hook.handle.remove()
    assert_plain(model)
    bank = filled(model)
    torch.testing.assert_close(logits(bank, ["lora", "prefix"]), EXPECTED["['lora', 'prefix']"], **EXACT)
    bank.detach()
    assert_plain(model)


# ---- caches


def cache_of(out):
    return next(c for n in ("past_key_values", "cache", "cache_params") if (c := out.get(n)) is not None)


CACHED = {
    "llama": {}, "gemma3": {}, "bart": {"decoder_input_ids": IDS}, "t5": {"decoder_input_ids": IDS},
    "mamba": {}, "mamba2": {},
}  # fmt: skip


@pytest.mark.parametrize("family", CACHED)
def test_a_cache_belongs_to_its_route(family):
    bank = filled(make(family), WITHOUT_ATTENTION)
    more, name = CACHED[family], "past_key_values"
    if family.startswith("mamba"):
        name = "cache_params"

    def fill(row):
        with bank.route(row), torch.no_grad():
            return cache_of(bank.model(input_ids=IDS, use_cache=True, **more))

    def go_on(cache, row):
        step = {"decoder_input_ids": IDS[:, :1]} if more else {}
        with ExitStack() as stack:
            if row is not None:
                stack.enter_context(bank.route(row))
            with torch.no_grad():
                given = {name: cache, "use_cache": True}
                return bank.model(input_ids=IDS if more else IDS[:, :1], **given, **step).logits

    row = ["lora", "ia3"]
    expected = go_on(fill(row), row)
    again = copy.deepcopy(fill(row))
    assert torch.equal(go_on(again, row), expected)
    for other in (None, [None, None], ["ia3", "lora"], ["lora", None]):
        with pytest.raises(UsageError, match=r"another route.*[Nn]ew cache"):
            go_on(fill(row), other)
        with pytest.raises(UsageError, match=r"another route.*[Nn]ew cache"):
            go_on(copy.deepcopy(fill(row)), other)
    with torch.no_grad():
        plain = cache_of(bank.model(input_ids=IDS, use_cache=True, **more))
    with pytest.raises(UsageError, match=r"another route.*[Nn]ew cache"):
        go_on(copy.deepcopy(plain), row)
    assert torch.equal(go_on(copy.deepcopy(plain), [None]), go_on(plain, None))
    bank.detach()


def test_caches_of_every_kind_go_on(bank):
    row = ["lora", "houlsby"]
    expected = written(bank, row)
    assert torch.equal(expected, _with(bank, row, cache_implementation="static"))
    cache = tf.DynamicCache()
    assert torch.equal(expected, _with(bank, row, past_key_values=cache))
    with bank.route(row), torch.no_grad():
        out = bank.model.get_submodule("model")(input_ids=IDS, use_cache=True, return_dict=False)
        assert bank.model(input_ids=IDS[:, :1], past_key_values=out[1]).logits.shape[1] == 1
        with pytest.raises(UsageError, match="another route"), bank.route([None, None]):
            bank.model(input_ids=IDS[:, :1], past_key_values=out[1])
        repeated = bank.model(input_ids=IDS, use_cache=True).past_key_values
        repeated.batch_repeat_interleave(2)
        bank.model(input_ids=IDS[[0, 0, 1, 1], :1], past_key_values=repeated)
    for r in (["lora", "prefix"], ["prompt", None]):
        beams = _with(bank, r, num_beams=3)
        for i in range(2):
            assert torch.equal(beams[i : i + 1], _with(bank, r[i : i + 1], IDS[i : i + 1], num_beams=3))
    static = tf.StaticCache(bank.model.config, max_cache_len=16)
    with torch.no_grad():
        logits_of = bank.model(input_ids=IDS, past_key_values=static).logits
        with pytest.raises(UsageError, match="another route"), bank.route(row):
            bank.model(input_ids=IDS[:, :1], past_key_values=static)
        static.reset()  # empty again: anybody's
        with bank.route(row):
            assert not torch.equal(bank.model(input_ids=IDS, past_key_values=static).logits, logits_of)


def _with(bank, row, ids=IDS, **more):
    with bank.route(row):
        return generated(bank.model, ids, **more)


def test_a_cache_does_not_outlive_its_adapter(bank):
    with bank.route(["lora"]), torch.no_grad():
        cache = bank.model(input_ids=IDS, use_cache=True).past_key_values
    bank.remove("lora")
    bank.add("lora", inlay.LoRA(r=3), seed=5)
    with pytest.raises(UsageError, match="another route"), bank.route(["lora"]), torch.no_grad():
        bank.model(input_ids=IDS[:, :1], past_key_values=cache)


# ---- lifetimes


def alive():
    """Tensors, what the backwards of our own functions hold, and forwards."""
    gc.collect()
    kinds = torch.Tensor, torch.autograd.function.FunctionCtx, Forward
    return {id(o): o for o in gc.get_objects() if issubclass(type(o), kinds)}


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_of_a_forward_outlives_it(bank, recompute):
    def work():
        for row in ROUTES:
            with ExitStack() as stack:
                if recompute:
                    stack.enter_context(bank.recomputing())
                gradients(bank, row)
            for parameter in bank.parameters():
                parameter.grad = None
            written(bank, row)
            hook = Interrupting(bank.model.lm_head)
            with pytest.raises(KeyboardInterrupt):
                gradients(bank, row)
            hook.handle.remove()
            with bank.route(row), pytest.raises(UsageError):
                bank.model(input_ids=tokens(3))

    work()
    before = set(alive())
    bank.set("prefix")
    logits(bank)
    bank.set(None)
    work()
    left = [o for number, o in alive().items() if number not in before]
    assert not left, [(type(o), [type(r) for r in gc.get_referrers(o)]) for o in left]


# ---- refusals


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (3, "3"), ("nobody", "'nobody'"), (["lora", 3], "3"), ({"lora": {"a": 1}}, "'lora'"), ({3: 1.0}, "3"),
        ({"lora": float("nan")}, "nan"), ({"lora": float("inf")}, "inf"), ({"lora": "much"}, "'much'"), ("", "''"),
        ([["lora"]], "'lora'"), ({"lora": None}, "None"), (b"lora", "b'lora'"), ({"lora": True}, "True"),
    ],
)  # fmt: skip
def test_rows_of_the_wrong_kind_are_named(bank, row, said):
    for call in (lambda: bank.route([row]), lambda: bank.set(row)):
        with pytest.raises(UsageError) as caught:
            call()
        assert said in str(caught.value)


@pytest.mark.parametrize("rows", ["lora", None, 3, {"lora": 1.0}, []])
def test_rows_that_are_no_list_are_named(bank, rows):
    with pytest.raises(UsageError, match="one entry for each row"):
        bank.route(rows)


@pytest.mark.parametrize("name", ["", 3, None])
def test_names_are_words(bank, name):
    with pytest.raises(UsageError, match="name"):
        bank.add(name, inlay.LoRA())


def test_an_adapter_in_use_stays(bank):
    opened, done = threading.Event(), threading.Event()

    def elsewhere():
        with bank.route(["lora", ["ia3", "prefix"]]):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert opened.wait(60)
    for name in ("lora", "ia3", "prefix"):
        with pytest.raises(UsageError, match=f"'{name}' is in use"):
            bank.remove(name)
    done.set()
    thread.join()
    bank.set("lora")
    with pytest.raises(UsageError, match="'lora' is in use"):
        bank.remove("lora")
    bank.set(None)
    made = bank.route(["lora", None])
    bank.remove("lora")
    with pytest.raises(UsageError, match="'lora' was removed"), made:
        pass


def test_wrapped_and_attached_models_are_refused(bank):
    import peft

    with pytest.raises(UsageError, match="already"):
        inlay.attach(bank.model)
    wrapped = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.get_submodule("base_model.model")):
        with pytest.raises(UsageError, match=r"PEFT.*unload"):
            inlay.attach(model)
    inlay.attach(wrapped.unload()).detach()


# ---- torch.compile


@pytest.fixture(params=["eager", "aot_eager"])
def backend(request):
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


def assert_right(bank, call):
    """Routes that change from call to call, with and without gradients, by `call` of a compiled model."""
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for row in (*ROUTES, None, *ROUTES[::-1], None):
                with ExitStack() as stack:
                    if row is not None:
                        stack.enter_context(bank.route(row))
                    found = call(input_ids=IDS).logits
                torch.testing.assert_close(found, EXPECTED[str(row)], **EXACT)


@pytest.fixture(scope="module", autouse=True)
def expected():
    bank = filled(make("llama"))
    EXPECTED.update({str(row): logits(bank, row).detach() for row in (*ROUTES, None)})
    bank.detach()


EXPECTED: dict[str, torch.Tensor] = {}


def test_a_compiled_model_follows_its_routes(backend):
    model = make("llama")
    compiled = torch.compile(model, backend=backend)
    compiled(input_ids=IDS)  # what was compiled before knows no hooks
    bank = filled(compiled)
    assert bank.model is model
    assert not any("_orig_mod" in path for path in bank.adapters["lora"].sites)
    assert_right(bank, compiled)
    with bank.route(["lora", "prefix"]):
        words = generated(compiled)
    bank.detach()
    torch.testing.assert_close(compiled(input_ids=IDS).logits, EXPECTED["None"], **EXACT)
    bank = filled(model)
    assert torch.equal(words, written(bank, ["lora", "prefix"]))
    bank.detach()


@pytest.mark.parametrize("first", [False, True])
def test_a_model_compiled_in_place_follows_its_routes(first):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make("llama")
    if first:
        model.compile(backend=backend)
        model(input_ids=IDS)
        torch._dynamo.reset()
    seen = len(graphs)
    bank = filled(model)
    assert len(graphs) == seen  # attaching looks at the model as it is written
    if not first:
        model.compile(backend=backend)
    assert_right(bank, model)
    bank.detach()


def test_compiled_blocks_follow_their_routes(backend):
    bank = inlay.attach(make("llama"))
    for layer in bank.model.get_submodule("model.layers").children():
        layer.compile(backend=backend)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            logits(bank)  # what is compiled before there are adapters knows none of their hooks
            logits(bank, [None, None])
    assert_right(fill(bank), bank.model)
    bank.detach()


def test_models_with_compiled_blocks_are_refused():
    model = make("llama")
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(UsageError, match=r"model.layers.1 is compiled by itself.*Attach first"):
        inlay.attach(model)
    model = make("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(UsageError, match=r"model.layers.1 is compiled by itself"):
        inlay.attach(model)


def test_what_depends_on_routes_is_never_compiled():
    seen = []

    def run(x):
        seen.append(torch.compiler.is_compiling())
        return x * len(seen)

    inner = Uncompiled(run)

    @torch.compile(backend="eager")
    def outer(x):
        return inner(x + 1) + 1

    assert [outer(torch.ones(())).item() for _ in range(3)] == [3, 5, 7]
    assert seen == [False] * 3

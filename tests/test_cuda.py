"""What a GPU computes is what the CPU computes: mixed rows, packed rows, experts, decoding, training, runs."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.batch.past import BLOCK
from inlay.kernels.picked import Picked
from inlay.runs.run import run
from inlay.runtime.decode import Decoder
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import broken_off, content, reviews, settings  # noqa: F401
from test_decode import BASES, everyone, prompts_for, written
from test_experts import FAMILIES, randomise
from test_experts import make as make_mixture
from test_laws import PACKS, bank_of, gradients, ids_of, padded, rows_of
from test_laws import run as logits_of
from test_training import PLANS, examples
from zoo import ZOO, make

DEVICE = "cuda"
BOUNDS = {"t5": 5e-3}  # its norms compute in float32 whatever they are given, and its weights magnify that
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def near(ours, expected, bound=1e-4):
    """Tensors on two devices, by norm: parts of some bases compute in float32 whatever they are given."""
    ours, expected = ours.detach().cpu().double(), expected.detach().cpu().double()
    assert ours.isfinite().all() and (ours - expected).norm() <= bound * expected.norm().clamp(min=1e-3)


def two_banks(name, dtype=torch.float64):
    """A bank with every method here, and its twin on the GPU."""
    here, there = bank_of(name, dtype), bank_of(name, dtype, DEVICE)
    with torch.no_grad():
        for ours, twin in zip(here.parameters(), there.parameters(), strict=True):
            twin.copy_(ours)
    return here, there


def both(here, there, compute, bound=1e-4):
    """`compute(bank, device)` gives logits: values and every gradient must agree."""
    made = []
    for bank, device in ((here, "cpu"), (there, DEVICE)):
        logits = compute(bank, device)
        made.append([logits, *gradients(logits.double().square().sum(), list(bank.parameters()))])
    for expected, ours in zip(*made, strict=True):
        near(ours, expected, bound)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("vit", "mamba", "bloom")])
def test_mixed_rows_and_their_gradients(name, side):
    here, there = two_banks(name)
    rows = rows_of(here)
    ids, mask = padded(ids_of(rows), side)

    def compute(bank, device):
        with bank.route(rows):
            return logits_of(bank, name, ids.to(device), mask.to(device)) * mask.to(device)[..., None]

    both(here, there, compute, BOUNDS.get(name, 1e-4))


@pytest.mark.parametrize("name", PACKS)
def test_packed_segments_and_their_gradients(name):
    here, there = two_banks(name)
    rows = rows_of(here)
    pieces = ids_of(rows)
    pieces[1] = torch.randint(3, 48, (1, 29))

    def compute(bank, device):
        with bank.stream([(row, p.shape[1]) for row, p in zip(rows, pieces, strict=True)]):
            return logits_of(bank, name, torch.cat(pieces, 1).to(device))

    both(here, there, compute)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_what_is_computed_again(name):
    here, there = two_banks(name)
    rows = rows_of(here)
    ids = torch.cat([piece[:, :4] for piece in ids_of(rows)])

    def compute(bank, device):
        with bank.route(rows), bank.recomputing():
            return logits_of(bank, name, ids.to(device))

    both(here, there, compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "qwen3_moe"])
def test_fewer_bits(name, dtype):
    """Values and gradients as near to the exact ones as the CPU's: some methods magnify rounding a thousandfold."""
    exact, (here, there) = bank_of(name), two_banks(name, dtype)
    with torch.no_grad():
        for ours, twin in zip(exact.parameters(), here.parameters(), strict=True):
            ours.copy_(twin)
    rows = rows_of(exact)
    ids = torch.cat([piece[:, :4] for piece in ids_of(rows)])
    made = []
    for bank, device in ((exact, "cpu"), (here, "cpu"), (there, DEVICE)):
        with bank.route(rows):
            logits = logits_of(bank, name, ids.to(device)).double()
        grads = {n: gradients(logits.square().sum(), list(bank.parameters(n))) for n in bank.adapters}
        made.append(
            [logits.detach().cpu(), *(torch.cat([g.flatten().double().cpu() for g in own]) for own in grads.values())]
        )
    for expected, cpu, ours in zip(*made, strict=True):
        assert ours.isfinite().all()
        off = (cpu - expected).norm() / expected.norm().clamp(min=1e-3)
        assert (ours - expected).norm() <= max(10 * off, 1e-5) * expected.norm().clamp(min=1e-3)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_experts(name, few):
    made = []
    for device in ("cpu", DEVICE):
        bank = inlay.attach(make_mixture(name).to(device))
        for number in range(3):
            bank.add(f"a{number}", inlay.LoRA(r=2 + number, targets="all-linear"), seed=number)
            randomise(bank.parameters(f"a{number}"), number)
        ids = torch.randint(3, 48, (5, 6 if few else 40), generator=torch.Generator().manual_seed(1)).to(device)
        with bank.route(["a0", None, "a1", "a2", "a0"]):
            logits = bank.model(input_ids=ids).logits
        made.append([logits, *gradients(logits.square().sum(), list(bank.parameters()))])
    for expected, ours in zip(*made, strict=True):
        near(ours, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5", "qwen3_moe"])
def test_decoding_writes_the_same_tokens(name):
    here, there = two_banks(name)
    rows = rows_of(here)
    ids, mask = padded([piece[:, :4] for piece in ids_of(rows)], "left")
    written = []
    for bank, device in ((here, "cpu"), (there, DEVICE)):
        with bank.route(rows):
            out = bank.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=6, min_new_tokens=6,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        written.append(out[:, -6:].cpu())
    assert torch.equal(*written)


@pytest.mark.parametrize("name", [*BASES, "gpt_neox", "opt"])
def test_rows_that_come_and_go_write_the_same_tokens(name):
    """Every method and mixtures of them, in steps that are captured and others, beside a CPU."""
    here, there = two_banks(name)
    rows = [*everyone(here), *["small", "wide", None, "prompt", "short", "small"] * 2]
    asked, made = [(row, ids, 12) for row, ids in zip(rows, prompts_for(rows), strict=True)], []
    for bank in (here, there):
        decoder = Decoder(bank, 2**24, 16)
        made.append(written(decoder, asked, 12))
    assert made[0] == made[1]
    if name in ("llama", "qwen3", "gemma3", "gpt2", "mistral", "phi3"):
        assert decoder._captured._steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_captured_steps_give_the_logits_of_plain_ones(name, dtype):
    """Of the same tokens, chosen by the plain steps."""
    bank = bank_of(name, dtype, DEVICE)
    companies = [["small", "wide", None, "prompt", "short"], ["ia3", "dora", "norm", "houlsby", "short", "small"]]
    for company in companies[: 1 if name == "gemma3" else 2]:
        plain, ours = Decoder(bank, 2**24), Decoder(bank, 2**24)
        plain._captured.on = False
        prompts = prompts_for(company)
        for decoder in (plain, ours):
            for row, ids in zip(company, prompts, strict=True):
                decoder.add(row, ids, 40)
        for _ in range(36):
            (rows, expected), (own, got) = plain.step(), ours.step()
            near(got, expected, {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float64: 1e-10}[dtype])
            for one, other, token in zip(rows, own, expected.argmax(-1).tolist(), strict=True):
                plain.write(one, token)
                ours.write(other, token)
        assert ours._captured._steps, company
        for decoder in (plain, ours):
            for row in list(decoder.rows):
                decoder.end(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_picked_products(dtype):
    torch.manual_seed(0)
    downs, ups = torch.randn(7, 300, 24, dtype=torch.float64), [torch.randn(7, 8, n).double() for n in (513, 40, 256)]
    for own in (downs, *ups):
        own[0] = 0
    numbers, x = torch.randint(0, 7, (33, 2)), torch.randn(33, 300, dtype=torch.float64)
    given = [own.to(dtype) for own in (downs.view(-1, 24), x, *(up.view(-1, up.shape[2]) for up in ups))]
    exact = Picked(numbers, given[0].double(), tuple(up.double() for up in given[2:]))
    there = Picked(numbers.to(DEVICE), given[0].to(DEVICE), tuple(up.to(DEVICE) for up in given[2:]))
    low, ours = exact.low(given[1].double()), there.low(given[1].to(DEVICE))
    for layer, up in enumerate(given[2:]):
        y = torch.randn(33, up.shape[1]).to(dtype)
        made, expected = y.to(DEVICE), y.double()
        there.add_high(made, ours, layer)
        exact.add_high(expected, low, layer)
        near(made, expected, {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 20, 24), (8, 4, 64, 64), (1, 1, 128, 128), (4, 8, 80, 80)])
def test_attention_over_blocks(dtype, shape):
    """What stands behind a row's last key is not read, whatever it is."""
    pytest.importorskip("triton")
    from inlay.kernels.gpu.attention import attend

    torch.manual_seed(0)
    shared, group, dim, width = shape
    keys, values = torch.randn(9, shared, dim, BLOCK).to(dtype), torch.randn(9, shared, BLOCK, width).to(dtype)
    table, counts = torch.stack([torch.randperm(8)[:3] for _ in range(4)]), torch.tensor([5, 33, 96, 64])
    table[0, 1:] = 8
    keys[8], values[8] = float("nan"), float("nan")  # of a row with five keys
    seen = (torch.arange(96) < counts[:, None]) & (torch.arange(96) % 5 != 1)
    q = torch.randn(4, shared * group, dim).to(dtype)
    k, v = (x.nan_to_num() for x in (keys, values))
    k, v = (k[table].permute(0, 2, 1, 4, 3).flatten(2, 3), v[table].transpose(1, 2).flatten(2, 3))
    scores = (q.double().view(4, shared, group, dim) @ k.double().transpose(2, 3)) * 0.3
    expected = (scores.masked_fill(~seen[:, None, None], -1e30).softmax(-1) @ v.double()).flatten(1, 2)
    made = attend(*(x.to(DEVICE) for x in (q, keys, values, table, counts, seen)), 0.3)
    near(made, expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "t5"])
def test_training_gives_the_same_adapters(name):
    dropless = Plan("lora", inlay.LoRA(r=4), lr=1e-2, batch_size=3, steps=8, seed=1)  # devices draw dropout differently
    plans = [dropless, *PLANS[1:], Plan("ia3", inlay.IA3(), lr=1e-2, batch_size=4, steps=8, seed=4)]
    banks = []
    for device in ("cpu", DEVICE):
        bank = inlay.attach(make(name).to(device))
        for _ in train_steps(bank, add_learners(bank, plans, 24), examples(), TokenBudget(4096, device=device)):
            pass
        banks.append(bank)
    for plan in plans:
        for expected, ours in zip(*(bank.parameters(plan.name) for bank in banks), strict=True):
            near(ours, expected, BOUNDS.get(name, 1e-4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_resumes_byte_for_byte(base_folder, reviews, tmp_path, dtype):  # noqa: F811
    given = {"device": DEVICE, "dtype": dtype}
    result = run(settings(base_folder, reviews, tmp_path / "whole", **given))
    broken_off(base_folder, reviews, tmp_path / "cut", **given)
    run(settings(base_folder, reviews, tmp_path / "cut", **given, resume=True))
    assert content(tmp_path / "whole") == content(tmp_path / "cut") and result["peak_gpu_memory_mb"] > 0

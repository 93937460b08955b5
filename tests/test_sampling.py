"""Tokens are drawn as transformers' logits processors say; a request's tokens are its own whatever stands beside it."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from inlay.errors import UsageError
from inlay.kernels import sampling as kernel
from inlay.runtime.drawing import drawings, sample
from inlay.runtime.sampling import Sampling

INF = math.inf


def logits(rows, width=97, spread=3.0, seed=0, dtype=torch.float32):
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def rows_of(settings, width=97, prompt=(), eos=()):
    return [drawings(one, prompt, eos, width, f"request {at}")[0] for at, one in enumerate(settings)]


def warped(scores, given, ids=None):
    """What transformers makes of logits before it draws."""
    made = LogitsProcessorList()
    ids = torch.zeros(len(scores), 0, dtype=torch.int64) if ids is None else ids
    if given.logit_bias:
        made.append(theirs.SequenceBiasLogitsProcessor({(at,): bias for at, bias in given.logit_bias.items()}))
    if given.repetition_penalty != 1:
        made.append(theirs.RepetitionPenaltyLogitsProcessor(given.repetition_penalty))
    if given.temperature > 0:
        made.append(theirs.TemperatureLogitsWarper(given.temperature))
        if given.top_k > 0:
            made.append(theirs.TopKLogitsWarper(given.top_k))
        if given.top_p < 1:
            made.append(theirs.TopPLogitsWarper(given.top_p))
        if given.min_p > 0:
            made.append(theirs.MinPLogitsWarper(given.min_p))
    return made(ids, scores)


LIMITS = [
    {}, {"top_k": 1}, {"top_k": 5}, {"top_k": 50}, {"top_k": 2000}, {"top_k": 10**6}, {"top_p": 0.9}, {"top_p": 0.5},
    {"top_p": 0.999}, {"top_p": 1e-6}, {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.8},
    {"top_k": 3000, "top_p": 0.95}, {"top_k": 60, "top_p": 0.9, "min_p": 0.02}, {"top_p": 0.7, "min_p": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("width", "spread"), [(97, 3.0), (6000, 3.0), (6000, 0.5)])  # 6000: sorted in two steps
def test_probabilities_are_those_of_transformers_warpers(dtype, width, spread):
    """All settings stand in one call. Where the cut is between equal logits, transformers leaves it to its sort which
    of them go, so what is compared there is how many stay."""
    raw = logits(len(LIMITS) * 2, width, spread, dtype=dtype)
    scores = raw.to(torch.promote_types(dtype, torch.float32))
    given = [Sampling(temperature=(0.7, 1.3)[at % 2], **LIMITS[at // 2]) for at in range(len(raw))]
    heat = torch.tensor([[one.temperature] for one in given], dtype=scores.dtype)
    weights = kernel.token_weights(
        scores / heat, [g.top_k for g in given], [g.top_p for g in given], [g.min_p for g in given]
    )
    for at, one in enumerate(given):
        expected = warped(scores[at : at + 1], one)[0]
        kept, mine = expected > -INF, weights[at] > 0
        assert mine.sum() == kept.sum(), one
        assert torch.equal(scores[at][mine].sort()[0], scores[at][kept].sort()[0]), one
        border = scores[at][kept].min()
        assert torch.equal(mine & (scores[at] != border), kept & (scores[at] != border)), one
        assert not torch.any(mine[scores[at] == border].int().diff() > 0)  # the lowest ids stay
        torch.testing.assert_close(
            (weights[at] / weights[at].sum()).sort()[0], expected.softmax(-1).sort()[0], rtol=2e-5, atol=1e-9
        )


@pytest.mark.parametrize("width", [13, 257, 1024, 5000])
def test_a_token_is_drawn_as_often_as_it_is_likely(width):
    """Chi-square over 6,000 draws of many seeds, answers and places; a right sampler passes 999 times in 1,000."""
    count, given = 6000, {"temperature": 0.9, "top_p": 0.95}
    scores = logits(1, width, 1.5, seed=width)
    made = [one for seed in range(count // 4) for one in drawings(Sampling(seed=seed, n=4, **given), (), (), width)]
    for at, row in enumerate(made):
        row.position = at % 7
    drawn = [
        token for at in range(0, count, 500) for token in sample(scores.expand(500, -1), made[at : at + 500]).tokens
    ]
    chances = warped(scores, Sampling(**given)).softmax(-1)[0].double()
    order = chances.argsort(descending=True)
    often = order[chances[order] * count >= 20][:40]
    counts = Counter(drawn)
    seen = torch.tensor([counts[int(token)] for token in often] + [0.0])
    wanted = torch.cat([chances[often] * count, torch.zeros(1).double()])
    seen[-1], wanted[-1] = count - seen.sum(), count - wanted.sum()
    assert all(chances[token] > 0 for token in counts)
    chi = ((seen - wanted) ** 2 / wanted.clamp(min=1)).sum()
    free = len(often)
    assert chi < free + 3.1 * math.sqrt(2 * free) + 6, (chi, free)


def test_pick_reaches_every_token_and_none_without_weight():
    weights = torch.zeros(1, 1000)
    weights[0, [3, 255, 256, 999]] = torch.tensor([1e-3, 1.0, 0.5, 1e-6])
    total = float(weights.double().sum())
    for uniform, token in [
        (0, 3), (0.9e-3 / total, 3), (1.1e-3 / total, 255), (1.0005 / total, 255), (1.0015 / total, 256),
        (1 - 1.1e-6 / total, 256), (1 - 0.5e-6 / total, 999), (1 - 2**-53, 999),
    ]:  # fmt: skip
        assert kernel.pick(weights, [uniform]).tolist() == [token], uniform
    many = torch.rand(64, 300, generator=torch.Generator().manual_seed(0))
    many[many < 0.5] = 0
    for uniform in (0.0, 1e-300, 0.5, 1 - 2**-53):
        assert bool((many.gather(1, kernel.pick(many, [uniform] * 64)[:, None]) > 0).all())


MIXED = [
    Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=0.7, top_p=0.9, seed=2),
    Sampling(temperature=1.5, top_k=7, seed=3, repetition_penalty=1.3), Sampling(repetition_penalty=1.2, seed=4),
    Sampling(temperature=0.9, min_p=0.1, seed=5, presence_penalty=0.8, frequency_penalty=-0.4),
    Sampling(temperature=1.1, seed=6, logit_bias={3: 5.0, 7: -INF}), Sampling(frequency_penalty=1.0, logprobs=3),
    Sampling(temperature=2.0, seed=8, min_new_tokens=4), Sampling(logit_bias={1: 9.0}, min_new_tokens=2),
    Sampling(temperature=1.0, seed=1), Sampling(temperature=0.8, top_k=20, top_p=0.7, min_p=0.01, seed=9, logprobs=0),
]  # fmt: skip


def written(settings, order, size, steps=12, width=97, dtype=torch.float32):
    """Each request's tokens, where `order` stands in batches of `size`; logits depend on request and place alone."""
    rows = rows_of(settings, width, prompt=[1, 2, 3, 3, 96], eos=[0])
    source = [logits(steps, width, seed=100 + at, dtype=dtype) for at in range(len(settings))]
    out = {at: [] for at in order}
    for step in range(steps):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            drawn = sample(torch.stack([source[at][step] for at in batch]), [rows[at] for at in batch])
            assert not drawn.errors and drawn.ids.tolist() == drawn.tokens
            for at, token in zip(batch, drawn.tokens, strict=True):
                out[at].append(token)
    return out


@pytest.mark.parametrize(("width", "dtype"), [(97, torch.float32), (5003, torch.float32), (5003, torch.bfloat16)])
def test_tokens_are_the_same_whatever_stands_beside(width, dtype):
    every = list(range(len(MIXED)))
    alone = written(MIXED, every, 1, width=width, dtype=dtype)
    assert alone[1] != alone[2] and len(set(map(tuple, alone.values()))) > 10
    for order, size in [(every, len(every)), (every[::-1], 5), (every[3:] + every[:3], 7), ([8, 1, 11], 3)]:
        got = written(MIXED, order, size, width=width, dtype=dtype)
        assert all(got[at] == alone[at] for at in order)


def test_one_seed_draws_one_answer_and_n_draws_several():
    def answers(given):
        made = drawings(given, (), (), 97)
        steps = [sample(logits(1, seed=step).expand(len(made), -1), made).tokens for step in range(20)]
        return list(zip(*steps, strict=True)), [row.seed for row in made]

    first, seeds = answers(Sampling(temperature=1.5, seed=7, n=3))
    assert answers(Sampling(temperature=1.5, seed=7, n=3))[0] == first and len(set(first)) == 3 and seeds == [7] * 3
    assert answers(Sampling(temperature=1.5, seed=7))[0] == first[:1]
    assert answers(Sampling(temperature=1.5, seed=8))[0] != first[:1]
    unseeded, seeds = answers(Sampling(temperature=1.5, n=2))
    assert len(set(seeds)) == 1 and answers(Sampling(temperature=1.5, n=2, seed=seeds[0]))[0] == unseeded
    assert answers(Sampling(temperature=1.5, n=2))[1] != seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changed_logits_are_those_of_transformers(dtype, monkeypatch):
    """Twelve steps of bias, repetition penalty and temperature together: what the token is drawn from is equal to the
    last bit, and the greedy tokens are the same."""
    given = Sampling(temperature=0.6, repetition_penalty=1.7, logit_bias={5: 2.5, 90: -INF, 8: -1.25}, seed=3)
    greedy = Sampling(repetition_penalty=1.7, logit_bias={5: 2.5, 90: -INF, 8: -1.25})
    prompt = [4, 5, 5, 60]
    rows = rows_of([given, greedy], prompt=prompt)
    seen = []
    monkeypatch.setattr(
        "inlay.runtime.drawing.token_weights", lambda x, *a: seen.append(x) or kernel.token_weights(x, *a)
    )
    ids = [[*prompt], [*prompt]]
    for step in range(12):
        raw = logits(2, seed=step, dtype=dtype)
        held = raw.clone()
        drawn = sample(raw, rows)
        assert torch.equal(raw, held)
        assert torch.equal(seen[-1], warped(raw[:1], given, torch.tensor(ids[:1])))
        assert drawn.tokens[1] == warped(raw[1:], greedy, torch.tensor(ids[1:])).argmax()
        for row, token in zip(ids, drawn.tokens, strict=True):
            row.append(token)
    assert len(set(ids[1][4:])) > 6


def test_each_place_draws_anew():
    """Equal logits at each place: the tokens are independent draws."""
    row = drawings(Sampling(temperature=1.0, seed=0), (), (), 1000)[0]
    drawn = [sample(torch.zeros(1, 1000), [row]).tokens[0] for _ in range(200)]
    assert 160 < len(set(drawn)) < 200 and 400 < sum(drawn) / 200 < 600


def test_presence_and_repetition_stand_beside_each_other():
    """The repetition penalty reads the prompt too, the others do not."""
    row = drawings(Sampling(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5), [1, 2], (), 5)[0]
    raw = torch.tensor([[0.0, 9.0, -1.0, 4.2, 1.0]])
    assert [sample(raw, [row]).tokens[0] for _ in range(5)] == [1, 3, 1, 1, 1]  # 4.5, 4.2, 3.0, 2.5, 2.0


def test_presence_and_frequency_count_the_answer_alone():
    """OpenAI's: logit - count * frequency - (count > 0) * presence; more tokens than there is room for at first."""
    given = Sampling(presence_penalty=0.7, frequency_penalty=0.3, max_new_tokens=300)
    row = drawings(given, [1, 2, 3], (), 400)[0]
    counts: Counter[int] = Counter()
    for step in range(300):
        raw = logits(1, 400, 1.2, seed=step)
        expected = raw[0].clone()
        for token, count in counts.items():
            expected[token] -= 0.3 * count + 0.7
        token = sample(raw, [row]).tokens[0]
        assert token == expected.argmax()
        counts[token] += 1
    assert len(counts) > 130 and counts.most_common(1)[0][1] > 1


def test_an_answer_does_not_end_too_early():
    given = Sampling(min_new_tokens=3, stop_token_ids=[9], max_new_tokens=5)
    rows = rows_of([given, Sampling(min_new_tokens=3, ignore_eos=True), Sampling()], 12, eos=[0, 4])
    raw = torch.zeros(3, 12)
    raw[:, 9], raw[:, 4], raw[:, 0], raw[:, 7] = 4.0, 3.0, 2.0, 1.0
    got = [sample(raw, rows).tokens for _ in range(4)]
    assert got == [[7, 9, 9]] * 3 + [[9, 9, 9]]
    assert given.ends([0, 4]) == {0, 4, 9} and Sampling(ignore_eos=True, stop_token_ids=[1]).ends([0]) == {1}
    expected = theirs.MinNewTokensLengthLogitsProcessor(2, 3, [0, 4, 9])(torch.zeros(1, 4, dtype=torch.int64), raw[:1])
    assert expected.argmax() == 7


def test_logprobs_are_the_models_own():
    raw = logits(3, dtype=torch.bfloat16)
    settings = [
        Sampling(logprobs=4), Sampling(temperature=2.0, seed=1, top_k=2, logprobs=0, repetition_penalty=1.5),
        Sampling(),
    ]  # fmt: skip
    drawn = sample(raw, rows_of(settings, prompt=[1, 2]))
    expected = raw.float().log_softmax(-1)
    first, second, third = drawn.logprobs
    assert third is None and first is not None and second is not None
    assert first.chosen == expected[0].max() == first.best[0][1] and first.best[0][0] == drawn.tokens[0]
    assert [score for _, score in first.best] == expected[0].topk(4).values.tolist()
    assert all(expected[0, token] == score for token, score in first.best) and len({t for t, _ in first.best}) == 4
    assert second.best == () and second.chosen == expected[1, drawn.tokens[1]]
    assert len(sample(raw[:1, :3], rows_of([Sampling(logprobs=9)], 3)).logprobs[0].best) == 3
    exact = sample(raw[:1].double(), rows_of([Sampling(logprobs=1)])).logprobs[0]
    assert exact.chosen == pytest.approx(float(raw[0].double().log_softmax(-1).max()), rel=1e-14)


def test_equal_logits_give_the_first_token():
    raw = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert sample(raw, rows_of([Sampling()], 4)).tokens == [int(raw.argmax())] == [1]


def test_a_broken_row_ends_alone():
    raw = logits(7, seed=5)
    good = raw.clone()
    raw[1, 50], raw[3], raw[4, 2] = math.nan, -INF, INF
    settings = [
        Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, seed=2), Sampling(),
        Sampling(temperature=0.5, top_p=0.5, seed=4, logprobs=2), Sampling(logprobs=1),
        Sampling(logit_bias={at: -INF for at in range(97)}, temperature=1.0),
        Sampling(repetition_penalty=1e-44, seed=1),
    ]  # fmt: skip
    rows = rows_of(settings, prompt=list(range(97)))
    for row in rows:
        row.position = 2
    drawn = sample(raw, rows)
    assert sorted(drawn.errors) == [1, 3, 4, 5, 6]
    said = {at: str(error) for at, error in drawn.errors.items()}
    assert said[1].startswith("request 1: the model's logits are NaN at token 3 of the answer. ")
    assert said[3].startswith("request 3: the model's logits are all -inf at token 3")
    assert said[4].startswith("request 4: the model's logits are infinite at token 3")
    assert (
        said[5] == "request 5: logit_bias or min_new_tokens forbid every token at token 3 of the answer. Forbid fewer."
    )
    assert said[6].startswith(
        "request 6: temperature 0 and repetition_penalty 1e-44 take the logits beyond their range"
    )
    assert [drawn.tokens[at] for at in drawn.errors] == [0] * 5 and drawn.ids.tolist() == drawn.tokens
    assert [row.position for row in rows] == [3, 2, 3, 2, 2, 2, 2] and drawn.logprobs == [None] * 7
    again = rows_of([settings[0], settings[2]])
    for row in again:
        row.position = 2
    assert sample(good[[0, 2]], again).tokens == [drawn.tokens[0], drawn.tokens[2]]


def test_a_row_that_forbids_all_and_has_nan_says_nan():
    row = rows_of([Sampling(logit_bias={at: -INF for at in range(97)})])
    assert "NaN" in str(sample(torch.full((1, 97), math.nan), row).errors[0])


def test_other_forms_of_logits():
    settings = MIXED[:6]
    expected = sample(logits(6), rows_of(settings, prompt=[1, 2])).tokens
    assert sample(logits(6).T.contiguous().T, rows_of(settings, prompt=[1, 2])).tokens == expected
    assert sample(logits(6).requires_grad_(), rows_of(settings, prompt=[1, 2])).tokens == expected
    with torch.inference_mode():
        inside = logits(6)
        assert sample(inside, rows_of(settings, prompt=[1, 2])).tokens == expected
    assert sample(inside, rows_of(settings, prompt=[1, 2])).tokens == expected
    assert sample(torch.zeros(0, 97), []).tokens == []
    with pytest.raises(UsageError, match=r"shape \(2, 1, 97\) do not fit 2 rows"):
        sample(torch.zeros(2, 1, 97), rows_of(settings[:2]))
    with pytest.raises(UsageError, match=r"shape \(2, 96\) do not fit 2 rows and a vocabulary of 97"):
        sample(torch.zeros(2, 96), rows_of(settings[:2]))
    wider = torch.nn.functional.pad(logits(6), (0, 3), value=-INF)  # another row's added tokens
    assert sample(wider, rows_of(settings, prompt=[1, 2])).tokens == expected


def test_ids_without_a_logit_are_no_matter_in_a_prompt():
    """A base may read more ids than it writes; a prompt's image or virtual tokens may stand there as -1."""
    given = Sampling(repetition_penalty=1.5)
    assert sample(logits(1), rows_of([given], prompt=[1, 500, -1])).tokens == sample(
        logits(1), rows_of([given], prompt=[1])
    ).tokens  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0. Choose a whole number of 1 or more."),
        ({"max_new_tokens": True}, "max_new_tokens is True. Choose a whole number of 1 or more."),
        ({"min_new_tokens": 9, "max_new_tokens": 8},
         "min_new_tokens is 9 and max_new_tokens 8. Choose a min_new_tokens that is no larger."),
        ({"temperature": -1}, "temperature is -1. Choose 0 for the likeliest token, or a number of 1e-06 or more."),
        ({"temperature": 1e-9}, "temperature is 1e-09. Choose 0 for"),
        ({"temperature": math.nan}, "temperature is nan. Choose 0 for"),
        ({"temperature": INF}, "temperature is inf. Choose 0 for"),
        ({"temperature": "hot"}, "temperature is 'hot'. Choose 0 for"),
        ({"top_p": 0}, "top_p is 0. Choose a number above 0, up to 1."),
        ({"top_p": 1.5}, "top_p is 1.5. Choose a number above 0, up to 1."),
        ({"top_k": -2}, "top_k is -2. Choose a whole number of -1 or more."),
        ({"top_k": 1.5}, "top_k is 1.5. Choose a whole number of -1 or more."),
        ({"min_p": 2}, "min_p is 2. Choose a number from 0 to 1."),
        ({"repetition_penalty": 0}, "repetition_penalty is 0. Choose a number above 0."),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5. Choose a number from -2 to 2."),
        ({"frequency_penalty": None}, "frequency_penalty is None. Choose a number from -2 to 2."),
        ({"logit_bias": [1]}, "logit_bias is [1]. Give a mapping of token ids to numbers."),
        ({"logit_bias": {"a": 1}}, "a token of logit_bias is 'a'. Choose a whole number of 0 or more."),
        ({"logit_bias": {4: INF}}, "logit_bias of token 4 is inf. Choose a number, or -inf to forbid the token."),
        ({"logprobs": -1}, "logprobs is -1. Choose a whole number of 0 or more, or None for no report."),
        ({"stop": ["a", ""]}, "stop is ['a', '']. Give strings of one character or more."),
        ({"stop": 5}, "stop is 5. Give strings of one character or more."),
        ({"stop_token_ids": [2, -1]}, "a token of stop_token_ids is -1. Choose a whole number of 0 or more."),
        ({"stop_token_ids": 2}, "stop_token_ids is 2. Give a list of token ids."),
        ({"ignore_eos": 1}, "ignore_eos is 1. Choose True or False."),
        ({"n": 0}, "n is 0. Choose a whole number of 1 or more."),
        ({"seed": 2**64}, "seed is 18446744073709551616. Choose a whole number of 64 bits, or None to draw one."),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(given, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        Sampling(**given)


def test_settings_are_held_in_one_form():
    import numpy as np

    given = Sampling(stop="end", top_k=np.int64(4), temperature=np.float32(0.5), stop_token_ids={3}, logit_bias={4: 1})
    assert given == Sampling(stop=("end",), top_k=4, temperature=0.5, stop_token_ids=(3,), logit_bias={4: 1.0})
    assert type(given.top_k) is int and type(given.temperature) is float and hash(given) == hash(given)


def test_tokens_that_the_base_does_not_have_are_refused():
    with pytest.raises(
        UsageError, match=r"logit_bias names the token 97, and the base has 97\. Choose ids from 0 to 96"
    ):
        rows_of([Sampling(logit_bias={97: 1.0})])
    with pytest.raises(UsageError, match=r"stop_token_ids names the token 100, and the base has 97"):
        rows_of([Sampling(stop_token_ids=[100])])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("width", "spread"), [(97, 3.0), (6000, 3.0), (6000, 0.5)])
def test_a_gpu_draws_the_same_tokens(width, spread):
    for dtype in (torch.float64, torch.bfloat16):
        raw = logits(len(MIXED), width, spread, dtype=dtype)
        raw[3, 5] = math.nan
        here = sample(raw, rows_of(MIXED, width, prompt=[1, 2], eos=[0]))
        there = sample(raw.cuda(), rows_of(MIXED, width, prompt=[1, 2], eos=[0]))
        assert there.ids.is_cuda and there.tokens == here.tokens and there.errors.keys() == here.errors.keys() == {3}

"""An answer's text comes in pieces that together are what the tokenizer decodes, and ends where it is asked to."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import toks
from inlay.errors import UsageError
from inlay.runtime.sampling import Sampling
from inlay.runtime.stops import Answer, Detokenizer, StopStrings

TEXTS = [
    'the quick "film", it\'s a good 1,234 ...  two  spaces\n\n\ttab',
    "这部电影很好看 总之，这部电影很差。龘䶮",
    "ok 😀👨‍👩‍👧🏳️‍🌈 café e\u0301 \u200b नमस्ते ไทย \ufffd end",
]


def end_of_word():
    """Like GPT-1's: a word's last piece has a sign that is a space, but not at the end."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>")
    inner.train_from_iterator(toks.WORDS * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def unigram():
    """Like T5's, with transformers' cleaning of spaces."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=180, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    inner.train_from_iterator(toks.WORDS * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )


def with_more():
    """Tokens that were added later, some of them special."""
    made = toks.byte_level()
    made.add_tokens(["<tool>", "你好吗", " spaced "])
    made.add_tokens(["<think>"], special_tokens=True)
    return made


def smollm2():
    from inlay.bases.load import load_tokenizer

    return load_tokenizer("smollm2")


MAKERS = {
    "byte-level": toks.byte_level, "llama": toks.llama_like, "llama, legacy": lambda: toks.llama_like(legacy=True),
    "word pieces": toks.word_pieces, "end of word": end_of_word, "unigram": unigram, "added": with_more,
    "in Python": ByT5Tokenizer, "smollm2": smollm2,
}  # fmt: skip


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


def streams(tokenizer, count=150):
    """Real texts, random ids with some that nobody has, and runs of single bytes."""
    rng = random.Random(0)
    beyond = 0 if isinstance(tokenizer, ByT5Tokenizer) else 9  # its own decode fails on them
    width = 250 if not beyond else len(tokenizer) + beyond
    of_bytes = sorted(Detokenizer(tokenizer).bytes)
    broken = of_bytes or [token for token in range(width) if "\ufffd" in tokenizer.decode([token])] or [1]
    share = 0.6 if of_bytes else 0.97  # no run of more than 32 bytes
    for text in TEXTS:
        yield tokenizer(text).input_ids
        yield tokenizer(text, add_special_tokens=False).input_ids[1:]
    for at in range(count):
        ids = [rng.randrange(width) for _ in range(rng.randrange(1, 60))]
        yield ids if at % 2 else [rng.choice(broken) if rng.random() < share else token for token in ids]


def test_the_pieces_are_what_the_tokenizer_decodes(tokenizer):
    of = Detokenizer(tokenizer)
    for ids in streams(tokenizer):
        stream = of.stream()
        got = "".join(map(stream.push, ids)) + stream.finish()
        assert got == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_no_piece_holds_a_part_of_a_character(tokenizer):
    of = Detokenizer(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text.replace("\ufffd", ""), add_special_tokens=False).input_ids
        whole, sent, stream = tokenizer.decode(ids, skip_special_tokens=True), "", of.stream()
        pieces = [stream.push(token) for token in ids]
        for piece in pieces:
            sent += piece
            assert whole.startswith(sent) and "\ufffd" not in piece
        assert len([piece for piece in pieces if piece]) > 4  # it does not wait for the end


@pytest.mark.parametrize("make", [toks.byte_level, toks.llama_like, unigram])
def test_a_token_costs_the_same_however_long_the_answer_is(make):
    """Tokens that are decoded again with each new one: few at any length, of broken characters and single bytes too."""
    tokenizer = make()
    of = Detokenizer(tokenizer)
    sizes, inner = [], of.decode
    of.decode = lambda ids: sizes.append(len(ids)) or inner(ids)
    rng = random.Random(1)
    sure = [token for token in range(len(tokenizer)) if of.has_text(token)]
    broken = [token for token in sure if "\ufffd" in tokenizer.decode([token])] or sure
    stream = of.stream()
    for token in (
        [rng.choice(sure) for _ in range(2000)] + [rng.choice(broken) for _ in range(2000)] + [broken[0]] * 999
    ):
        stream.push(token)
    assert max(sizes) < 160 and sum(sizes) < 5000 * 100


def test_a_long_run_of_bytes_is_sent_before_its_end():
    tokenizer = toks.llama_like()
    name = tokenizer.convert_tokens_to_ids
    ids = [name(f"<0x{byte:02X}>") for byte in ("龘" * 40).encode()]
    stream = Detokenizer(tokenizer).stream()
    pieces = [stream.push(token) for token in ids]
    assert pieces[32] == "龘" * 11 and "".join(pieces) + stream.finish() == "龘" * 40
    assert stream.finish() == ""


# ---- stop strings


def chopped(text, rng):
    while text:
        size = rng.randrange(1, 5)
        yield text[:size]
        text = text[size:]


def first_stop(text, stops):
    """The string that is complete first, the longest of those, and the text in front of it, by trying every end."""
    for end in range(1, len(text) + 1):
        there = [stop for stop in stops if text[:end].endswith(stop)]
        if there:
            return max(there, key=len), text[: end - max(map(len, there))]
    return None, text


def test_stop_strings_are_found_in_any_pieces():
    rng = random.Random(2)
    found = 0
    for _ in range(3000):
        text = "".join(rng.choice("aab") for _ in range(rng.randrange(0, 24)))
        stops = ["".join(rng.choice("aab") for _ in range(rng.randrange(1, 7))) for _ in range(rng.randrange(0, 4))]
        seen, sent = StopStrings(stops), ""
        expected = first_stop(text, stops)
        for piece in chopped(text, rng):
            sent += seen.push(piece)
            assert expected[1].startswith(sent)
        held = seen.finish()
        assert (seen.found, sent + held) == expected
        longest = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        assert seen.found is not None or len(held) == longest  # no more is held back than has to be
        found += seen.found is not None
    assert 1000 < found < 2800


def test_stops_over_tokens(tokenizer):
    """A stop string across the borders of tokens ends the answer, and no part of it was sent before."""
    rng = random.Random(3)
    of = Detokenizer(tokenizer)
    ids = tokenizer(TEXTS[0] + TEXTS[0], add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for _ in range(30):
        start = rng.randrange(len(whole) - 8)
        stop = whole[start : start + rng.randrange(1, 8)]
        answer = Answer(Sampling(stop=[stop, "nowhere"], max_new_tokens=9999), detokenizer=of)
        sent = ""
        for token in ids:
            sent += answer.push(token)
            if answer.finish_reason:
                break
        rest = answer.finish()
        assert (answer.finish_reason, answer.stopped_by) in [("stop", stop), (None, None)]
        assert sent + rest == answer.text == first_stop(whole, [stop])[1]
        assert answer.finish_reason == "stop" or (rest and whole.count(stop) == 1 and whole.endswith((rest, stop)))


# ---- the end of an answer


@pytest.fixture(scope="module")
def bytes_of():
    return Detokenizer(toks.byte_level())


def given(answer, ids):
    """The pieces until the answer ends."""
    pieces = []
    for token in ids:
        pieces.append(answer.push(token))
        if answer.finish_reason:
            break
    return pieces


def test_reasons_of_the_end(bytes_of):
    tokenizer = bytes_of.tokenizer
    ids, end = tokenizer("a good film").input_ids, tokenizer.eos_token_id
    extra = tokenizer("!").input_ids[0]
    for settings, tokens, reason, by, text in [
        ({}, [*ids, end, 9], "stop", end, "a good film"),
        ({"ignore_eos": True, "max_new_tokens": len(ids) + 2}, [*ids, end, extra], "length", None, "a good film!"),
        ({"max_new_tokens": len(ids)}, [*ids, end], "length", None, "a good film"),
        ({"max_new_tokens": len(ids) + 1}, [*ids, end], "stop", end, "a good film"),
        ({"stop_token_ids": [extra]}, [*ids, extra, *ids], "stop", extra, "a good film"),
        ({"stop": "film", "max_new_tokens": len(ids)}, ids, "stop", "film", "a good "),
        ({"stop": "film!"}, [*ids, end], "stop", end, "a good film"),
        ({"stop": "<|im_end|>"}, [*ids, 3, *ids], "stop", "<|im_end|>", "a good film"),
        ({"stop": "unheard of"}, [*ids, 3, end], "stop", end, "a good film"),
        ({"min_new_tokens": len(ids), "stop_token_ids": ids}, [*ids, end], "stop", end, "a good film"),
    ]:
        answer = Answer(Sampling(**settings), [end], bytes_of)
        pieces = given(answer, tokens)
        assert (answer.finish_reason, answer.stopped_by, answer.text) == (reason, by, text), settings
        assert "".join(pieces) == text and answer.ids == tokens[: len(answer.ids)] and answer.finish() == ""


def test_a_stop_string_counts_only_behind_the_least_tokens(bytes_of):
    ids = bytes_of.tokenizer("good good good").input_ids
    count = len(bytes_of.tokenizer("good").input_ids)
    answer = Answer(Sampling(stop="good", min_new_tokens=count), detokenizer=bytes_of)
    given(answer, ids)
    assert answer.text == "good " and answer.stopped_by == "good"


def test_an_answer_that_breaks_off_in_a_character_says_so(bytes_of):
    ids = bytes_of.tokenizer("龘").input_ids
    answer = Answer(Sampling(max_new_tokens=2), detokenizer=bytes_of)
    assert len(ids) == 3 and given(answer, ids) == ["", "\ufffd"] and answer.finish_reason == "length"
    left = Answer(Sampling(stop="龘!"), detokenizer=bytes_of)
    assert given(left, ids) == ["", "", ""] and left.finish() == "龘" == left.text and left.finish_reason is None


def test_without_a_tokenizer_there_are_ids_alone():
    answer = Answer(Sampling(max_new_tokens=3), [7])
    assert given(answer, [1, 7]) == ["", ""] and answer.ids == [1, 7] and answer.stopped_by == 7 and answer.text == ""
    with pytest.raises(UsageError, match="stop strings are found in text, and no tokenizer is given"):
        Answer(Sampling(stop="x"))

"""Words to tokens: the same for a row alone and among others, with any tokenizer; control tokens; texts of any
length.
"""

from __future__ import annotations

import random

import pytest
from tokenizers import decoders

import toks
from inlay.data.encode import PIECE, Encoder
from inlay.data.prepare import prepare
from inlay.data.table import Row
from inlay.data.template import Template
from inlay.data.tokens import common
from inlay.data.words import CHUNK, LONG, Words
from inlay.errors import DroppedRow, UsageError

KINDS = {
    "byte": toks.byte_level, "ending": toks.ending, "llama": toks.llama_like, "legacy": lambda: toks.llama_like(True),
    "pieces": toks.word_pieces,
}  # fmt: skip
PAIRS = Template("completion", "{prompt}", "completion", text="prompt")
TEXT = Template("text", answer="text")
LABEL = Template("label", "Review: {text}\nSentiment:", "label", {"0": ["negative"], "1": ["positive"]}, text="text")
SIGNS = [
    "a good film", " ", "\n", "  ", "\n\n", "很好看", "，", "。", "it's", "...", "(", '"', "1234", "0", " the", "\t",
    "é", "e\u0301",
    "😀", "👩‍👩‍👧", "Sentiment:", ": ", "{", "}", "\u3000", "“", "ﷺ", "नमस्ते", "한국어", "\u00a0", "\r\n", "don't",
    "'s",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def row(number=0, **values):
    return Row(values, number, "rows.jsonl", number + 1)


def mixture(random, most):
    return "".join(random.choice(SIGNS) for _ in range(random.randint(1, most)))


def plain(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def parting(tokenizer, prompt, whole):
    """The token that begins with the answer, where whitespace and words part there; else the first that differs."""
    told = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in told["offset_mapping"]]
    if prompt and prompt[-1].isspace() != whole[len(prompt)].isspace() and len(prompt) in starts:
        first = starts.index(len(prompt))
        if not any(end > len(prompt) for _, end in told["offset_mapping"][:first]):
            return first
    return common(told["input_ids"], plain(tokenizer, prompt))


def test_the_answer_begins_where_prompt_and_whole_part(tokenizer):
    """Places found in one tokenisation are those that two would find, and many rows at once what each gives alone."""
    draw = random.Random(5)
    rows = [row(n, prompt=mixture(draw, 8), completion=mixture(draw, 5)) for n in range(700)]
    encoder, words = Encoder(tokenizer, PAIRS, 1000), Words(tokenizer)
    for one, found in zip(rows, encoder.drafts(rows), strict=True):
        if isinstance(found, DroppedRow):
            assert found.reason in ("no answer", "both sides empty")
            continue
        prompt, whole = one.values["prompt"], one.values["prompt"] + one.values["completion"]
        ids = [*words.opening, *plain(tokenizer, whole)]
        assert list(found[0].ids[: len(ids)]) == ids
        assert found[0].loss_mask.index(True) == len(words.opening) + parting(tokenizer, prompt, whole)
        assert found == encoder.drafts([one])[0]


def test_prompts_end_in_no_end_and_rows_in_one(tokenizer):
    encoder, words = Encoder(tokenizer, PAIRS, 100), Words(tokenizer)
    one = row(prompt="question", completion=" answer")
    asked, example = encoder.prompt_ids(one), encoder.example(one)
    assert asked == [*words.opening, *plain(tokenizer, "question")]
    assert example.ids.count(tokenizer.eos_token_id) == 1 and example.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["byte", "ending", "llama", "legacy"])
def test_a_bos_and_an_eos_of_the_rows_own_are_not_doubled(kind):
    tokenizer = toks.byte_level(bos_token="<s>") if kind == "byte" else KINDS[kind]()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    usual = Encoder(tokenizer, TEXT, 100).example(row(text="question answer")).ids
    for text in (
        "<s>question answer</s>",
        "<s>question answer",
        "question answer</s>\n",
        "<s><s>question answer</s></s>",
    ):
        ids = Encoder(tokenizer, TEXT, 100).example(row(text=text)).ids
        opened = ids if ids[0] == start else (start, *ids)
        assert opened == (usual if usual[0] == start else (start, *usual)), text
        assert (ids[0] == start) == (text.startswith("<s>") or usual[0] == start)
    pair = row(prompt="<s>question", completion=" answer</s>")
    ids = Encoder(tokenizer, PAIRS, 100).example(pair).ids
    assert ids.count(start) == ids.count(end) == 1 and ids[0] == start and ids[-1] == end
    asked = Encoder(tokenizer, PAIRS, 100).prompt_ids(pair)
    assert asked == [start, *plain(tokenizer, "question")]
    label = Encoder(tokenizer, Template("label", "{text}:", "label", LABEL.verbalizer), 100)
    ids = label.example(row(text="<s>a</s> film", label=1)).ids
    assert ids.count(start) == ids.count(end) == 1 and tokenizer.decode(ids, skip_special_tokens=True).endswith(
        "positive"
    )


@pytest.mark.parametrize("kind", ["byte", "ending", "llama", "legacy"])
def test_control_tokens_within_a_rows_text_are_words(kind):
    tokenizer = toks.byte_level(bos_token="<s>") if kind == "byte" else KINDS[kind]()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    lead = len(Words(tokenizer).opening)
    for text in ("so </s> it is", "<s", "a<s>b</s>c", "good</s>, <s>"):
        for template, one in (
            (LABEL, row(text=text, label=0)), (TEXT, row(text=text + ".")),
            (PAIRS, row(prompt=f"x{text}", completion=f"{text}.")),
        ):  # fmt: skip
            ids = Encoder(tokenizer, template, 200).example(one).ids
            assert not special & set(ids[lead:-1]) and text in tokenizer.decode(ids)


def test_markup_of_the_template_is_meant_and_that_of_the_text_is_not():
    tokenizer = toks.byte_level(bos_token="<s>")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    prompt = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    template = Template("label", prompt, "label", LABEL.verbalizer, slot=True, after="<|im_end|>", text="text")
    encoder = Encoder(tokenizer, template, 200)
    usual, forged = row(text="good film", label=1), row(text="good<|im_end|>\n<|im_start|>film", label=1)
    for one in (usual, forged):
        example, choices = encoder.example(one), encoder.choices(one)
        assert example.ids.count(start) == example.ids.count(end) == 2
        learned = [i for i, on in zip(example.ids, example.loss_mask, strict=True) if on]
        assert tokenizer.decode(learned) == "positive<|im_end|></s>"
        assert example.ids[: len(choices.prompt)] == choices.prompt == tuple(encoder.prompt_ids(one))
        assert one.values["text"] in tokenizer.decode(example.ids)
    assert encoder.encode([usual, forged]) == [encoder.encode([usual])[0], encoder.encode([forged])[0]]


def test_rows_that_their_author_wrote_out_keep_their_markup():
    tokenizer = toks.byte_level(bos_token="<s>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    talk = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert Encoder(tokenizer, TEXT, 100).example(row(text=talk)).ids.count(end) == 2
    prompt, _, answer = talk.partition("b")
    ids = Encoder(tokenizer, PAIRS, 100).example(row(prompt=prompt, completion="b" + answer)).ids
    assert ids.count(end) == 1 and list(ids[: ids.index(end)]) == plain(tokenizer, "<|im_start|>user\na")


def test_texts_longer_than_a_row_come_in_pieces(tokenizer):
    words = Words(tokenizer)
    text = " ".join(f"film {n}, 很好看。\n" for n in range(60))
    whole = [*plain(tokenizer, text), *words.ended([])]
    for length in (2, 3, 7, 50, 10_000):
        (found,) = Encoder(tokenizer, TEXT, length).drafts([row(3, text=text)])
        assert isinstance(found, list)
        lead = len(words.opening)
        if length > len(words.opening) + 1:
            joined = [token for example in found for token in example.ids[lead:]]
            assert joined == whole
            assert all(len(e.ids) <= length and all(e.loss_mask) and len(e.ids) == len(e.loss_mask) for e in found)
            assert [e.sample for e in found] == [3 + (n << PIECE) for n in range(len(found))]
            assert all(e.ids[:lead] == tuple(words.opening) for e in found)
    prepared = prepare(Encoder(tokenizer, TEXT, 50), [row(text=text), row(1, text="a good film")])
    assert prepared.counts["in pieces"] == 1 and len(prepared.examples) > 2


@pytest.mark.parametrize(
    "text", ["film good, 123 it's ", "很好看。我喜欢", "好", "a", "\n", " ", "line\n", "a\u0301", "<s> </s>"]
)
def test_nothing_of_a_very_long_text_is_lost(text, tokenizer):
    """Tokens of pieces are those of the whole, but for those across two pieces."""
    long = "x" + text * (2 * LONG // len(text)) + "end"
    (tokens,) = Words(tokenizer).encode([long])
    if getattr(tokenizer, "cls_token", None) is None:  # word pieces know no spaces
        assert tokenizer.decode(tokens.ids, clean_up_tokenization_spaces=False) == long
    (short,) = Words(tokenizer).encode([long[:CHUNK]])
    assert common(tokens.ids, short.ids) >= min(len(short.ids), CHUNK // 3) // 2


@pytest.mark.parametrize("filler", ["film good it's ", "很好看。", "好"])
def test_hopelessly_long_prompts_are_cut_as_shorter_ones_are(filler, tokenizer):
    """What is kept does not depend on how much too long a prompt is."""
    huge, much = (filler * (size // len(filler)) for size in (700_000, 6000))
    label, pairs = Encoder(tokenizer, LABEL, 40), Encoder(tokenizer, PAIRS, 40)
    found, usual = (label.example(row(text="start " + words, label=1)) for words in (huge, much))
    assert found.ids == usual.ids and found.loss_mask == usual.loss_mask and found.cut
    sizes = [len(label.example(row(text="start " + huge, label=one)).ids) for one in (0, 1)]
    assert max(sizes) == 40 and len(found.ids) == sizes[1]
    found, usual = (pairs.example(row(prompt=words + " end", completion=" answer")) for words in (huge, much))
    assert found.ids == usual.ids and found.loss_mask == usual.loss_mask and found.cut
    (dropped,) = pairs.encode([row(prompt="a", completion=huge)])
    assert isinstance(dropped, DroppedRow) and dropped.reason == "answer too long"


@pytest.mark.parametrize("length", [1000, 30])
def test_what_opens_a_text_stays_with_the_virtual_tokens_behind_it(length, tokenizer):
    """In training and after, in prompts that are cut at their beginning and in those cut before the label."""
    pairs, label = (Encoder(tokenizer, template, length, "after-system") for template in (PAIRS, LABEL))
    lead = len(Words(tokenizer).opening)
    one, judged = row(prompt="film " * 60, completion=" answer"), row(text="film " * 60, label=1)
    example = pairs.example(one)
    assert (example.cut > 0) == (length == 30) and example.ids[:lead] == tuple(Words(tokenizer).opening)
    assert example.virtual_at == pairs.prompt(one)[1] == min(lead, 1)
    assert (
        label.example(judged).virtual_at == label.choices(judged).virtual_at == label.prompt(judged)[1] == min(lead, 1)
    )


def test_a_prompt_is_parted_as_it_is_before_its_answer(tokenizer):
    """Where a prompt ends in lines, tokenizers part them by what follows."""
    encoder = Encoder(tokenizer, PAIRS, 200)
    for end in ("\n", "\n\n", " \n\n", "\t", "\n\n\n", "\r\n\r\n"):
        one = row(prompt=f"a good film{end}", completion="好看。")
        example, asked = encoder.example(one), encoder.prompt_ids(one)
        assert example.ids[: len(asked)] == tuple(asked), repr(end)
        if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            learned = [i for i, on in zip(example.ids, example.loss_mask, strict=True) if on]
            assert tokenizer.decode(learned).startswith("好")


def test_the_shorter_of_two_limits_counts():
    tokenizer = toks.byte_level()
    one = row(text="film " * 60, label=1)
    assert len(Encoder(tokenizer, LABEL, 64, limit=30).example(one).ids) == 30
    assert len(Encoder(tokenizer, LABEL, 20, limit=30).example(one).ids) == 20
    assert len(Encoder(tokenizer, LABEL, 64, limit=None).example(one).ids) == 64
    assert len(Encoder(tokenizer, PAIRS, 1 << 20, limit=30).prompt_ids(row(prompt="film " * 60))) == 30
    with pytest.raises(UsageError, match="positions leave 1"):
        Encoder(tokenizer, LABEL, 64, limit=1)


def test_settings_of_a_saved_tokenizer_cut_and_pad_nothing():
    tokenizer = toks.byte_level()
    rows = [row(text="a good film " * n, label=1) for n in (1, 9)]
    usual = Encoder(tokenizer, LABEL, 200).encode(rows)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert Encoder(tokenizer, LABEL, 200).encode(rows) == usual


def test_a_tokenizer_without_a_fast_core_gives_the_same():
    fast, slow = toks.byte_level(bos_token="<s>"), toks.byte_level(bos_token="<s>")
    encoder = Encoder(slow, PAIRS, 300)
    encoder.words.core = None
    draw = random.Random(9)
    rows = [row(n, prompt=mixture(draw, 6), completion="x" + mixture(draw, 4) + "</s> b") for n in range(60)]
    assert encoder.encode(rows) == Encoder(fast, PAIRS, 300).encode(rows)

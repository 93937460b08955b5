"""`inlay serve` through OpenAI's own client: answers equal those of `generate`, whatever runs beside them."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import openai
import pytest

from inlay.data.encode import Encoder
from inlay.data.prompting import prompt_row
from inlay.evaluation.predict import predicted_labels
from inlay.runtime.generating import generate
from inlay.runtime.memory import TokenBudget
from inlay.runtime.requests import Request
from inlay.runtime.sampling import Sampling
from serving import ADAPTERS, REVIEW, make_adapters

NEW = 8


@pytest.fixture(scope="module")
def client(running):
    return running.client()


def ids_of(running, text):
    return running.tokenizer(text, add_special_tokens=False).input_ids


def test_the_base_and_all_adapters_are_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny", *sorted(ADAPTERS)]
    assert client.models.retrieve("plain").id == "plain"


@pytest.mark.parametrize("model", ["tiny", *ADAPTERS])
def test_completions_take_the_prompt_as_it_is(running, client, model):
    text, ids = running.alone(None if model == "tiny" else model, ids_of(running, "a good film"), max_new_tokens=NEW)
    made = client.completions.create(model=model, prompt="a good film", max_tokens=NEW, temperature=0)
    assert made.choices[0].text == text
    assert made.usage.completion_tokens == len(ids)
    assert made.usage.prompt_tokens == len(ids_of(running, "a good film"))
    given = client.completions.create(
        model=model, prompt=ids_of(running, "a good film"), max_tokens=NEW, temperature=0
    )  # fmt: skip
    assert given.choices[0].text == text


def test_adapters_differ(running):
    said = {m: running.alone(m, ids_of(running, "a good film"), max_new_tokens=NEW)[0] for m in (None, *ADAPTERS)}
    assert len(set(said.values())) >= 4  # the tests above can tell one from another


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("tiny", "<|im_start|>user\na good film<|im_end|>\n<|im_start|>assistant\n"),
        ("plain", "<|im_start|>user\na good film<|im_end|>\n<|im_start|>assistant\n"),
        ("chats", "<|im_start|>user\na good film<|im_end|>\n<|im_start|>assistant\n"),
        ("asks", "Question: a good film\nAnswer:"),
        ("reviews", "Review: a good film\nSentiment:"),
    ],
)
def test_chat_uses_the_template_of_the_training(running, client, model, written):
    text, _ = running.alone(None if model == "tiny" else model, ids_of(running, written), max_new_tokens=NEW)
    made = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "a good film"}], max_tokens=NEW, temperature=0
    )
    assert made.choices[0].message.content == text
    assert made.choices[0].message.role == "assistant"
    assert made.usage.prompt_tokens == len(ids_of(running, written))


def test_a_conversation_has_no_place_in_a_template_of_single_prompts(client):
    turns = [{"role": role, "content": "a film"} for role in ("user", "assistant", "user")]
    with pytest.raises(openai.BadRequestError, match="trained on single prompts"):
        client.chat.completions.create(model="asks", messages=turns)
    assert client.chat.completions.create(model="chats", messages=turns, max_tokens=1).choices


def test_streams_give_the_same_in_pieces(running, client):
    text, ids = running.alone("plain", ids_of(running, "a good film"), max_new_tokens=NEW)
    pieces = list(
        client.completions.create(
            model="plain",
            prompt="a good film",
            max_tokens=NEW,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == text
    assert pieces[-1].usage.completion_tokens == len(ids) and not pieces[-1].choices
    reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
    assert reasons[-1] in ("length", "stop") and not any(reasons[:-1])


def test_chats_stream_and_report_logprobs(client):
    given = dict(
        model="chats", messages=[{"role": "user", "content": "a film"}], max_tokens=NEW, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    whole = client.chat.completions.create(**given).choices[0]
    pieces = list(client.chat.completions.create(**given, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content
    streamed = [one for p in pieces if p.choices[0].logprobs for one in p.choices[0].logprobs.content]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in whole.logprobs.content])
    assert all(len(one.top_logprobs) == 2 and one.logprob == one.top_logprobs[0].logprob for one in streamed)


def test_many_at_once_are_each_as_alone(running):
    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        jobs = []
        for number in range(24):
            model = [*ADAPTERS, "tiny"][number % 5]
            jobs.append(
                client.completions.create(
                    model=model, prompt=f"film number {number}", max_tokens=NEW, temperature=0.9, seed=number
                )
            )
        return await asyncio.gather(*jobs)

    for number, made in enumerate(asyncio.run(ask())):
        model = [*ADAPTERS, "tiny"][number % 5]
        route = None if model == "tiny" else model
        prompt = ids_of(running, f"film number {number}")
        alone = running.alone(route, prompt, max_new_tokens=NEW, temperature=0.9, seed=number)[0]
        assert made.choices[0].text == alone


def test_several_prompts_and_answers(running, client):
    prompts = ["a good film", "a bad one"]
    made = client.completions.create(model="plain", prompt=prompts, n=2, max_tokens=4, temperature=1, seed=5)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    given = dict(max_new_tokens=4, temperature=1.0, seed=5)
    for number, prompt in enumerate(prompts):
        assert made.choices[2 * number].text == running.alone("plain", ids_of(running, prompt), **given)[0]
    pieces = client.completions.create(
        model="plain", prompt=prompts, n=2, max_tokens=4, temperature=1, seed=5, stream=True
    )
    text = ["", "", "", ""]
    for piece in pieces:
        text[piece.choices[0].index] += piece.choices[0].text
    assert text == [choice.text for choice in made.choices]


def test_settings_reach_the_drawing(running, client):
    ids = ids_of(running, "a good film")
    given = dict(max_new_tokens=NEW, temperature=1.5, seed=3)
    more = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3}
    made = client.completions.create(
        model="plain", prompt="a good film", max_tokens=NEW, temperature=1.5, seed=3, top_p=0.9, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={"7": 3}, extra_body=more,
    )  # fmt: skip
    alone = running.alone(
        "plain", ids, **given, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 3}, **more
    )
    assert made.choices[0].text == alone[0]
    text = running.alone("plain", ids, max_new_tokens=NEW)[0]
    stopped = client.completions.create(
        model="plain", prompt="a good film", max_tokens=NEW, temperature=0, stop=[text[2:4]]
    )
    assert stopped.choices[0].text == text[: text.index(text[2:4])] and stopped.choices[0].finish_reason == "stop"


def test_a_mix_is_a_model(running, client):
    mix = {"plain": 0.5, "asks": 2.0}
    alone = running.alone(mix, ids_of(running, "a good film"), max_new_tokens=NEW)[0]
    given = dict(prompt="a good film", max_tokens=NEW, temperature=0)
    assert client.completions.create(model=json.dumps(mix), **given).choices[0].text == alone
    assert client.completions.create(model="x", **given, extra_body={"model": mix}).choices[0].text == alone


def test_echo_reports_what_the_model_makes_of_the_prompt(running, client):
    import torch

    ids = ids_of(running, "a good film")
    made = client.completions.create(
        model="plain", prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
    ).choices[0]
    with torch.no_grad(), running.bank.route(["plain"]):
        logits = running.bank.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    right = logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    assert made.logprobs.token_logprobs[0] is None
    assert made.logprobs.token_logprobs[1:-1] == pytest.approx(right, abs=1e-4)
    assert len(made.logprobs.tokens) == len(ids) + 1 and made.text.startswith("a good film")
    best = [max(one.values()) for one in made.logprobs.top_logprobs[1:-1]]
    assert best == pytest.approx(logits[:-1].amax(-1).tolist(), abs=1e-4)
    nothing = client.completions.create(model="plain", prompt="a good film", max_tokens=0, logprobs=1, echo=True)
    assert nothing.choices[0].text == "a good film" and nothing.usage.completion_tokens == 0
    assert nothing.choices[0].logprobs.token_logprobs[1:] == pytest.approx(right, abs=1e-4)


def test_labels_come_with_their_probabilities(running, client):
    texts = ["a good film", "a bad one", "neither"]
    answer = httpx.post(f"{running.url}/v1/classify", json={"model": "reviews", "input": texts}).json()
    encoder = Encoder(running.tokenizer, REVIEW, 512)
    rows = [prompt_row(REVIEW, text) for text in texts]
    right = predicted_labels(running.bank, encoder, rows, "reviews", TokenBudget(4096))
    for made, own in zip(answer["data"], right, strict=True):
        assert made["label"] == own.answer and made["probabilities"] == pytest.approx(own.probabilities, abs=1e-5)
    one = httpx.post(f"{running.url}/v1/classify", json={"model": "reviews", "input": {"text": texts[0]}}).json()
    assert one["data"][0] == answer["data"][0]
    none = httpx.post(f"{running.url}/v1/classify", json={"model": "asks", "input": texts})
    assert none.status_code == 400 and "labels" in none.json()["error"]["message"]


def test_prompts_that_were_read_before_are_counted(running, client):
    prompt = "a very long review of a good film " * 3
    first, second = (
        client.completions.create(model="plain", prompt=prompt, max_tokens=2, temperature=0).usage for _ in range(2)
    )
    assert second.prompt_tokens_details.cached_tokens > 0
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens


def test_adapters_come_and_go(base_folder, running, client, tmp_path):
    path = running.folder / "later"
    make_adapters(base_folder, tmp_path, ["plain"], seed=9)
    (tmp_path / "plain").rename(path)
    load = {"lora_name": "new", "lora_path": "later"}
    assert httpx.post(f"{running.url}/v1/load_lora_adapter", json=load).status_code == 200
    running.bank.load("new", path)
    alone = running.alone("new", ids_of(running, "a good film"), max_new_tokens=NEW)[0]
    given = dict(prompt="a good film", max_tokens=NEW, temperature=0)
    assert client.completions.create(model="new", **given).choices[0].text == alone
    found = httpx.get(f"{running.url}/v1/adapters").json()["data"]
    assert next(one for one in found if one["name"] == "new")["loaded"]
    assert next(one for one in found if one["name"] == "reviews")["labels"] == ["bad", "good"]
    assert httpx.post(f"{running.url}/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="new", **given)
    again = {**load, "lora_name": "reviews", "load_inplace": False}
    assert httpx.post(f"{running.url}/v1/load_lora_adapter", json=again).status_code == 400


def test_metrics_count_by_adapter(running, client):
    client.completions.create(model="chats", prompt="a good film", max_tokens=3, temperature=0)
    text = httpx.get(f"{running.url}/metrics").text
    assert 'inlay_requests_total{adapter="chats",outcome="done"}' in text
    assert 'inlay_time_to_first_token_seconds_count{adapter="chats"}' in text
    assert 'inlay_time_between_tokens_seconds_count{adapter="chats"}' in text
    assert "inlay_store_blocks " in text and "inlay_waiting " in text
    assert httpx.get(f"{running.url}/healthz").status_code == 200
    assert httpx.get(f"{running.url}/readyz").json() == {"status": "ready"}


SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["good", "bad"]}, "stars": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["label", "stars"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_of_a_schema_are_json_of_it(client, temperature):
    made = client.chat.completions.create(
        model="plain", messages=[{"role": "user", "content": "how good?"}], max_tokens=60, temperature=temperature,
        seed=1, n=3, response_format={"type": "json_schema", "json_schema": {"name": "opinion", "schema": SCHEMA}},
    )  # fmt: skip
    for choice in made.choices:
        said = json.loads(choice.message.content)
        assert set(said) == {"label", "stars"} and said["label"] in ("good", "bad") and 0 <= said["stars"] <= 99
        assert choice.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="schema cannot be used"):
        wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "poem"}}}
        client.completions.create(model="plain", prompt="x", extra_body={"response_format": wrong})


class Only:
    """A grammar that allows some tokens alone, and its own matcher."""

    def __init__(self, tokens, vocabulary=400):
        self.mask, self.taken = np.zeros(vocabulary, dtype=bool), []
        self.mask[tokens] = True

    def matcher(self):
        return self

    def allowed(self):
        return self.mask

    def take(self, token):
        self.taken.append(token)


def test_a_grammar_bounds_its_own_row_alone(running):
    ids, only, none = ids_of(running, "a good film"), Only([7]), Only([])
    settings = [Sampling(max_new_tokens=4, grammar=one, ignore_eos=True) for one in (only, None, none)]
    found = {0: [], 1: [], 2: []}
    for token in generate(running.bank, [Request("plain", ids, one, name="it") for one in settings]):
        found[token.request].append(token)
    assert [token.id for token in found[0]] == [7] * 4 == only.taken
    alone = running.alone("plain", ids, max_new_tokens=4, ignore_eos=True)[1]
    assert [token.id for token in found[1]] == alone != [7] * 4
    assert "the grammar, logit_bias or min_new_tokens forbid every token" in str(found[2][0].error)

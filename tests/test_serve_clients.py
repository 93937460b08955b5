"""Other people's clients of `inlay serve`, as they are: LangChain's, and the harness of EleutherAI for evaluations."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
import yaml

NEW = 8
SERVED = ["plain", "chats"]
SENTENCE = "a good film"
CHAT = "<|im_start|>user\na good film<|im_end|>\n<|im_start|>assistant\n"
MODELS = {"tiny": None, "plain": "plain", "chats": "chats"}
"""Names of models, and their routes."""


@pytest.fixture(scope="module")
def langchain():
    return pytest.importorskip("langchain_openai", reason="LangChain's client is not installed: langchain-openai")


@pytest.fixture(scope="module")
def harness():
    """The harness of EleutherAI. It is large, and no part of what development needs."""
    pytest.importorskip("aiohttp", reason="the harness has no client of servers: pip install 'lm-eval[api]'")
    return pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'lm-eval[api]'")


def ids_of(running, text):
    return running.tokenizer(text, add_special_tokens=False).input_ids


def written(running, model, text, **settings):
    """What `generate` writes behind a text."""
    return running.alone(MODELS[model], ids_of(running, text), **{"max_new_tokens": NEW, **settings})


def chat(running, langchain, model, **settings):
    given = {"temperature": 0, "max_tokens": NEW, "max_retries": 0, **settings}
    return langchain.ChatOpenAI(model=model, base_url=f"{running.url}/v1", api_key="none", **given)


# ---- LangChain


@pytest.mark.parametrize("model", list(MODELS))
def test_langchain_chats(running, langchain, model):
    text, ids = written(running, model, CHAT)
    made = chat(running, langchain, model).invoke(SENTENCE)
    assert made.content == text and made.response_metadata["model_name"] == model
    assert made.usage_metadata["output_tokens"] == len(ids)
    assert made.usage_metadata["input_tokens"] == len(ids_of(running, CHAT))
    talk = [("system", "You judge."), ("human", SENTENCE), ("ai", "yes"), ("human", "again")]
    told = "".join(
        f"<|im_start|>{role}\n{words}<|im_end|>\n"
        for role, words in [("system", "You judge."), ("user", SENTENCE), ("assistant", "yes"), ("user", "again")]
    )
    assert (
        chat(running, langchain, model).invoke(talk).content
        == (written(running, model, told + "<|im_start|>assistant\n")[0])
    )


def test_langchain_streams_in_threads_and_tasks(running, langchain):
    text, ids = written(running, "plain", CHAT)
    client = chat(running, langchain, "plain", stream_usage=True)
    pieces = list(client.stream(SENTENCE))
    assert "".join(piece.content for piece in pieces) == text
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == len(ids)
    assert [made.content for made in client.batch([SENTENCE] * 3)] == [text] * 3

    async def ask():
        streamed = "".join([piece.content async for piece in client.astream(SENTENCE)])
        return [streamed, *(made.content for made in await client.abatch([SENTENCE] * 3))]

    assert asyncio.run(ask()) == [text] * 4


def test_langchain_draws_and_reports_logprobs(running, langchain):
    text, ids = written(running, "plain", CHAT, temperature=0.9, top_p=0.8, seed=5)
    made = chat(
        running, langchain, "plain", temperature=0.9, top_p=0.8, seed=5, logprobs=True, top_logprobs=2
    ).invoke(SENTENCE)  # fmt: skip
    assert made.content == text
    assert len(made.response_metadata["logprobs"]["content"]) == len(ids)


def test_langchain_gets_objects_of_a_schema(running, langchain):
    schema = {
        "title": "Judged", "description": "A review", "type": "object", "additionalProperties": False,
        "properties": {"label": {"type": "string", "enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
        "required": ["label", "sure"],
    }  # fmt: skip
    client = chat(running, langchain, "plain", max_tokens=60).with_structured_output(schema, method="json_schema")
    found = client.invoke(SENTENCE)
    assert found["label"] in ("good", "bad") and isinstance(found["sure"], bool) and len(found) == 2


def test_langchain_completes(running, langchain):
    text = written(running, "plain", SENTENCE)[0]
    client = langchain.OpenAI(
        model="plain", base_url=f"{running.url}/v1", api_key="none", temperature=0, max_tokens=NEW, max_retries=0
    )
    assert client.invoke(SENTENCE) == text
    assert "".join(client.stream(SENTENCE)) == text
    assert client.batch([SENTENCE, "a bad one"]) == [text, written(running, "plain", "a bad one")[0]]


def test_langchain_is_told_of_unknown_models(running, langchain):
    import openai

    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat(running, langchain, "nobody").invoke(SENTENCE)


# ---- the harness of EleutherAI

ROWS = [
    {"text": "a good film", "label": 0}, {"text": "a bad film", "label": 1}, {"text": "good", "label": 0},
    {"text": "Review: a film, a question", "label": 1},
]  # fmt: skip
CHOICES = [" positive", " a negative answer"]


@pytest.fixture
def evaluated(running, harness, base_folder, tmp_path):
    """A function that runs a task, which lies on the disk with its rows, on a model of the server."""
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")},
    }  # fmt: skip
    tasks = {
        "choose": {
            "output_type": "multiple_choice", "doc_to_choice": CHOICES, "doc_to_target": "label",
            "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        },
        "write": {
            "output_type": "generate_until", "doc_to_target": "label", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW, "do_sample": False, "temperature": 0},
        },
    }  # fmt: skip
    for name, own in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **own}))

    def run(task, model, **settings):
        given = {
            "model": model, "base_url": f"{running.url}/v1/completions", "tokenizer": str(base_folder),
            "max_length": 128, **settings,
        }  # fmt: skip
        found = harness.simple_evaluate(
            model="local-completions", model_args=given, tasks=[task], log_samples=True, bootstrap_iters=0,
            task_manager=manager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
        return found["results"][task], sorted(found["samples"][task], key=lambda sample: sample["doc_id"])

    return run


def likelihood(running, route, text, choice):
    """The sum of a choice's logprobs behind a text, by one forward, and whether each is the largest."""
    ids, all_ids = ids_of(running, text), ids_of(running, text + choice)
    assert all_ids[: len(ids)] == ids
    with torch.no_grad(), running.bank.route([route]):
        logits = running.bank.model(input_ids=torch.tensor([all_ids])).logits[0].log_softmax(-1)
    places = range(len(ids) - 1, len(all_ids) - 1)
    own = [float(logits[place, all_ids[place + 1]]) for place in places]
    return sum(own), all(int(logits[place].argmax()) == all_ids[place + 1] for place in places)


@pytest.mark.parametrize(("model", "batch"), [("tiny", 1), ("plain", 3), ("chats", 1)])
def test_the_harness_scores_choices(running, evaluated, model, batch):
    result, samples = evaluated("choose", model, batch_size=batch, num_concurrent=2)
    right = 0
    for row, sample in zip(ROWS, samples, strict=True):
        own = [likelihood(running, MODELS[model], row["text"], choice) for choice in CHOICES]
        found = [response[0] for response in sample["resps"]]
        assert [float(value) for value, _ in found] == pytest.approx([value for value, _ in own], abs=1e-3)
        assert [greedy in (True, "True") for _, greedy in found] == [greedy for _, greedy in own]
        right += max(range(2), key=lambda n: own[n][0]) == row["label"]
    assert result["acc,none"] == right / len(ROWS)


def test_the_harness_scores_texts_that_it_sends_as_words(running, evaluated):
    _, samples = evaluated("choose", "plain", tokenized_requests=False)
    for row, sample in zip(ROWS, samples, strict=True):
        own = [likelihood(running, "plain", row["text"], choice)[0] for choice in CHOICES]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(own, abs=1e-3)


def test_the_harness_has_answers_written(running, evaluated):
    _, samples = evaluated("write", "plain")
    for row, sample in zip(ROWS, samples, strict=True):
        text = written(running, "plain", row["text"], stop=("\n\n", "<|im_end|>"))[0]
        assert sample["resps"][0][0] == text

"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level tokenizer with a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["Review: a good film\nSentiment: positive negative answer question"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def base_folder(tokenizer, tmp_path_factory):
    """A tiny random language model with its tokenizer, as a transformers folder."""
    folder = tmp_path_factory.mktemp("base")
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0, pad_token_id=0, bos_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    tf.set_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- a server, of the test files that ask for one: SERVED of the file names its adapters, SERVER holds its settings


@pytest.fixture(scope="module")
def folder(request, base_folder, tmp_path_factory):
    """A folder of adapters, in one of its own: all of `serving.ADAPTERS` where the file names none."""
    from serving import ADAPTERS, make_adapters

    path = tmp_path_factory.mktemp("served") / "adapters"
    make_adapters(base_folder, path, getattr(request.module, "SERVED", [*ADAPTERS]))
    return path


@pytest.fixture(scope="module")
def running(request, base_folder, folder):
    """A server over them, which asks for no key."""
    from serving import serving

    with serving(base_folder, folder, compare=True, **getattr(request.module, "SERVER", {})) as made:
        yield made


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """An empty file of keys."""
    from inlay.serve.http.keys import Keys

    made = Keys(tmp_path_factory.mktemp("keys") / "keys.sqlite", make=True)
    yield made
    made.close()

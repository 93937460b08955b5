"""Small tokenizers of several kinds, trained in a moment."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "Review: a good film\nSentiment: positive negative answer question Text: Label: 1 0 true false",
    "这部电影很好看 总之，这部电影很差。 我喜欢 好 差",
    'the quick brown fox, it\'s a "quoted" word... and 1,234 numbers\n\n',
]


def byte_level(**more: Any) -> PreTrainedTokenizerFast:
    """Like GPT-2's; knows some Chinese."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(WORDS * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", **more)


def ending() -> PreTrainedTokenizerFast:
    """One that puts BOS and EOS around every text of its own accord."""
    made = byte_level(bos_token="<s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 0)]
    )
    return made


def llama_like(legacy: bool = False) -> PreTrainedTokenizerFast:
    """Spaces are a sign of the words, a first word gets one, and BOS opens every text."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    inner.train_from_iterator(WORDS * 9, trainers.BpeTrainer(vocab_size=700, special_tokens=first))
    told = json.loads(inner.to_str())
    told["added_tokens"] = told["added_tokens"][:3]  # bytes are no special tokens
    inner = Tokenizer.from_str(json.dumps(told))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    """Like BERT's, with an end of text."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(
        WORDS * 9, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[CLS]", "[SEP]", "</s>"])
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )

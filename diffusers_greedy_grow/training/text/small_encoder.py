# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""A small text encoder for captions of a small language: it trains from scratch with the core, without a download."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def train_small_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """
    Train a lower-case byte-level BPE tokenizer on `captions`. It can tokenize every string, and ends each with `</s>`, so that
    an empty caption has a token, too.
    """
    special_tokens = ["<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def build_small_text_encoder(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, num_layers: int = 2
) -> T5EncoderModel:
    """
    Build a T5 encoder of `num_layers` layers and `hidden_size` channels with random weights.

    Its word embeddings start three times as large as T5's, so that each word remains recognizable after the layers. The encoder
    trains with the core only, which learns nothing from words for details that show at higher resolutions ("striped"), but the
    stages that grow later need these words.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=32,
        d_ff=4 * hidden_size,
        num_layers=num_layers,
        num_heads=max(1, hidden_size // 32),
        dropout_rate=0.0,
        feed_forward_proj="gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    text_encoder = T5EncoderModel(config)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.mul_(3)
    return text_encoder

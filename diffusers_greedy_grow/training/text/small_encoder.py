# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def train_small_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE tokenizer trained on `captions`; knows every string, ends each with `</s>`."""
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
    A T5 encoder of `num_layers` layers and `hidden_size` channels with random weights. Its word embeddings are three times as
    large as T5's, so that what its layers add does not bury the words: it trains with the core, which has no use for words
    about what only shows at a higher resolution, but the stages around it will need them.
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

# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A small text encoder, for data whose language is small: trained with the core from scratch, no download needed."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..pipelines import GreedyGrowPipeline
from ..pipelines.pipeline_greedy_grow import tokenize


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
    """A T5 encoder of `num_layers` layers and `hidden_size` channels with random weights."""
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
    return T5EncoderModel(config)


def tokenize_captions(
    pipeline: GreedyGrowPipeline, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `encoder_attention_mask` of `captions`, each `(B, L)`, as the pipeline makes them for prompts."""
    tokens = tokenize(pipeline.tokenizer, captions, pipeline.config.max_sequence_length).to(device)
    return {"input_ids": tokens["input_ids"], "encoder_attention_mask": tokens["attention_mask"].bool()}


def encode_captions(
    pipeline: GreedyGrowPipeline, text_encoder: torch.nn.Module, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """The model's text arguments for `captions`, as the pipeline makes them for prompts."""
    tokens = tokenize_captions(pipeline, captions, device)
    mask = tokens["encoder_attention_mask"]
    hidden_states = text_encoder(tokens["input_ids"], attention_mask=mask.long()).last_hidden_state
    return {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}

# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

from .arguments import (
    FREE_TO_CHANGE,
    OF_ONE_LAUNCH,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
    parse_buckets,
    parse_channels,
    parse_lora_arguments,
)
from .checkpoints import (
    check_changes,
    check_replaced,
    claim_output_dir,
    find_checkpoint,
    find_start,
    forget_newer,
    load_checkpoint,
    read_progress,
    remove_folder,
    save_checkpoint,
    save_pipeline,
    sorted_checkpoints,
)
from .data import (
    BrokenRows,
    BucketOrder,
    CaptionedImages,
    EpochOrder,
    check_data_dir,
    load_captioned_data,
    normalize,
    sample_generators,
)
from .loop import (
    GradientGuard,
    Interrupt,
    averaged,
    check_cpu,
    compute_dtype,
    leave_signals_to_the_parent,
    make_optimizer,
    multiplies_bfloat16,
    save_interrupted,
    set_attention_backend,
    set_up,
    start_trackers,
    take_step,
)
from .losses import FlowLoss, LossMeter, draw_noise, flow_loss
from .plan import PhasePlan, describe_parts, format_memory, format_plan, plan_phase
from .report import draw_losses, draw_samples, keep_metrics
from .sharding import TrainedModel, consolidate, gather, reshard, set_up_sharding, shard
from .streaming import StreamedImages, StreamLoader, load_captioned_stream
from .text import (
    TextEmbeddings,
    build_small_text_encoder,
    encode_captions,
    name_encoder,
    tokenize_captions,
    train_small_tokenizer,
    warn_of_cut_captions,
)

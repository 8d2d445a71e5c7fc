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
    find_checkpoint,
    find_start,
    forget_newer,
    load_checkpoint,
    read_progress,
    remove_folder,
    save_checkpoint,
    save_pipeline,
    sorted_checkpoints,
    take_folder,
)
from .data import (
    BrokenRows,
    BucketOrder,
    CaptionedPictures,
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
from .streaming import StreamedPictures, StreamLoader, load_captioned_stream
from .text import (
    TextEmbeddings,
    build_small_text_encoder,
    encode_captions,
    name_encoder,
    tokenize_captions,
    train_small_tokenizer,
    warn_of_cut_captions,
)

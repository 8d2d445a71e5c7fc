# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The arguments of `training_examples/`: flags over a YAML file over defaults."""

from dataclasses import dataclass, field

from .objective import WEIGHTINGS


@dataclass
class ImageArguments:
    """Captioned images."""

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub."})
    train_data_dir: str | None = field(
        default=None,
        metadata={"help": "A folder: imagefolder with metadata, parquet or WebDataset tar files; or one such file."},
    )
    image_column: str = field(default="image", metadata={"help": "The column with the images."})
    caption_column: str = field(default="text", metadata={"help": "The column with the captions."})
    max_broken_share: float = field(
        default=0.01,
        metadata={
            "help": "The largest share of broken captions, and of broken images; their rows are left out and named in a file."
        },
    )
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of captions left empty, for guidance."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Captions of the sample grid; held-out captions by default."}
    )


@dataclass
class DataArguments(ImageArguments):
    """What to train on; by default captioned shapes, drawn for the purpose."""

    high_res_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Other data above the core's resolution, and to hold images out from. That of the core is then read at the "
            "core's resolution."
        },
    )
    high_res_data_dir: str | None = field(
        default=None, metadata={"help": "Instead of it, a folder or file as train_data_dir."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read rows as they are needed, for data that is too large to be put on a disk first."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Streaming: among how many rows each worker draws the next one."}
    )
    aspect_ratio_buckets: str | None = field(
        default=None,
        metadata={
            "help": 'Heights and widths of images at the final resolution, such as "64,64;48,80;80,48": each image gets the '
            "nearest shape. All are square by default, and held-out ones always."
        },
    )
    shapes_objects: int = field(default=1, metadata={"help": "Captioned shapes: at most how many objects (1 to 3)."})
    shapes_images: int = field(default=20000, metadata={"help": "Captioned shapes: how many to draw."})
    num_high_res_images: int | None = field(
        default=None,
        metadata={"help": "Train above the core's resolution on that many images only, drawn at random."},
    )
    text_embeddings_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder to keep the embeddings of a text encoder that does not train, of use to other runs too."
        },
    )
    num_validation_images: int = field(default=256, metadata={"help": "Held-out images the loss is measured on."})
    num_scored_images: int = field(default=96, metadata={"help": "Captioned shapes: images drawn for the score."})

    @property
    def has_high_res_data(self) -> bool:
        return self.high_res_dataset_name is not None or self.high_res_data_dir is not None

    @property
    def on_shapes(self) -> bool:
        return self.dataset_name is None and self.train_data_dir is None


@dataclass
class ModelArguments:
    """The core, and what grows around it."""

    core: str | None = field(
        default=None,
        metadata={
            "help": "A trained pipeline to grow, a folder or Hub id; skips the core phase. What describes a core or its text encoder "
            "is then this one's, whose text encoder is used."
        },
    )
    core_revision: str | None = field(
        default=None, metadata={"help": "Its branch, tag or commit, if it is on the Hub."}
    )
    resolutions: list[int] = field(
        default_factory=lambda: [16, 64], metadata={"help": "The core's, then each stage's, in pixels."}
    )
    init: str = field(default="preserve", metadata={"help": '"preserve", or the paper\'s "random".'})
    patch_size: int = field(default=2, metadata={"help": "The core's."})
    hidden_size: int = field(default=128, metadata={"help": "The core's."})
    num_layers: int = field(default=6, metadata={"help": "The core's."})
    num_attention_heads: int = field(default=2, metadata={"help": "The core's."})
    mlp_ratio: float = field(default=4.0, metadata={"help": "The core's."})
    block_out_channels: list[str] = field(
        default_factory=lambda: ["48,96"],
        metadata={
            "help": 'Channels of each stage, outermost first, such as "64,128"; the last entry for all further stages.'
        },
    )
    layers_per_block: int = field(default=1, metadata={"help": "Residual blocks per entry of block_out_channels."})
    text_encoder: str = field(
        default="small",
        metadata={"help": 'A folder or Hub id, used frozen; or "small": one trained with the core, from scratch.'},
    )
    text_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Of the small text encoder, 128 by default. Of another, only to plan where it cannot be read."
        },
    )
    text_num_layers: int = field(default=1, metadata={"help": "Of the small text encoder."})
    max_sequence_length: int = field(default=64, metadata={"help": "How many text tokens are read."})


@dataclass
class LoopArguments:
    """What every training loop has."""

    output_dir: str = field(default="output", metadata={"help": "Where everything goes."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Whether to replace an earlier run there."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": '"latest", if there is one, or a checkpoint folder.'}
    )
    resume_with_changes: bool = field(
        default=False, metadata={"help": "Go on although arguments differ from those of the checkpoint."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per step."})
    lr_scheduler: str = field(default="cosine", metadata={"help": "Of diffusers.optimization, within each phase."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "In each phase, of which they are a tenth at most."})
    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's second beta."})
    adam_weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to it; with 0 they are not."})
    spike_factor: float = field(
        default=20.0,
        metadata={"help": "Leave out a step whose gradient has so many times the median norm of the last 100 steps."},
    )
    max_skipped_steps: int = field(default=20, metadata={"help": "Stop if more steps in a row are left out."})
    ema_decay: float = field(default=0.998, metadata={"help": "Of the moving average that is saved and sampled."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    attention_backend: str | None = field(
        default=None,
        metadata={"help": "Of diffusers, such as _native_cudnn or _native_math; torch's choice by default."},
    )
    mixed_precision: str | None = field(default=None, metadata={"help": '"no", "bf16" or "fp16".'})
    seed: int = field(default=0, metadata={"help": "Of weights, data order, noise and caption dropout."})
    num_inference_steps: int = field(default=20, metadata={"help": "Of the samples."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Of the samples."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between lines in metrics.jsonl."})
    checkpointing_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "How many checkpoints are kept."})
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Publish on the Hub, with the token of `hf auth login` or HF_TOKEN; grow.py publishes each phase's pipeline, "
            "under a tag of its name."
        },
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": 'The repository that is published to and that model cards name, such as "user/model"; one of your own with '
            "the name of output_dir by default."
        },
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Whether a new repository is private."})
    hub_license: str | None = field(default=None, metadata={"help": "For the model cards, such as apache-2.0."})
    report_to: str | None = field(
        default=None,
        metadata={"help": "A tracker of accelerate: tensorboard, wandb, trackio, or all that are installed."},
    )


@dataclass
class TrainingArguments(LoopArguments):
    """What trains for how long. Of arguments that take a value for each resolution or stage, the last one holds for all further."""

    plan: bool = field(default=False, metadata={"help": "Print the plan and stop."})
    plan_processes: int | None = field(
        default=None, metadata={"help": "Plan for so many processes; by default for those of this launch."}
    )
    core_steps: int = field(default=1600, metadata={"help": "Steps of the core phase; 0 trains all from scratch."})
    detail_steps: list[int] = field(default_factory=lambda: [600], metadata={"help": "For each stage."})
    joint_steps: list[int] = field(default_factory=lambda: [300], metadata={"help": "For each stage."})
    train_batch_size: list[int] = field(
        default_factory=lambda: [32, 16], metadata={"help": "Images per process and step, at each resolution."}
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [3e-3, 1.5e-3], metadata={"help": "Peak learning rate, at each resolution."}
    )
    core_lr_scale: float | None = field(
        default=None,
        metadata={"help": "Joint phase: the inner model's rate, relative; by default .3, from scratch 1."},
    )
    offload_ema: bool = field(
        default=False,
        metadata={"help": "Keep that average in the CPU's memory, from where it is fetched in every step: slow."},
    )
    logit_mean: list[float] = field(
        default_factory=lambda: [1.0, -0.7],
        metadata={
            "help": "Mean of logit(sigma) while each resolution trains, in terms of the core's noise level. Held-out losses "
            "are over the first one's levels, whichever resolution trains."
        },
    )
    logit_std: list[float] = field(
        default_factory=lambda: [1.0, 1.3], metadata={"help": "Its standard deviation, at each resolution."}
    )
    loss_weighting: list[str] = field(
        default_factory=lambda: ["velocity", "clean"],
        metadata={
            "help": f"By what error, or weight of noise levels, each resolution trains: {', '.join(WEIGHTINGS)}."
        },
    )
    low_res_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Joint phase: the weight of an extra loss on images pooled to the inner resolution."},
    )
    low_res_share: float = field(
        default=0.0,
        metadata={"help": "Joint phase: the share of a batch that only the inner model sees, at its resolution."},
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Also draw the captions of the sample grid after every so many steps."}
    )
    validation_steps: int = field(default=1000, metadata={"help": "Steps between held-out losses."})
    hub_steps: int | None = field(
        default=None,
        metadata={"help": "Also publish the averaged weights after every so many steps, on the branch `training`."},
    )


@dataclass(kw_only=True)
class LoraArguments(ImageArguments, LoopArguments):
    """What `train_lora.py` adapts, and how."""

    pretrained_model_name_or_path: str = field(metadata={"help": "The pipeline to adapt, a folder or Hub id."})
    revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit, if it is on the Hub."})
    output_dir: str = field(default="output-lora", metadata={"help": "Where everything goes."})
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Images are scaled to it and averaged down to the model's, as a core's are by grow.py; by default "
            "four times a core's, and a grown model's own."
        },
    )
    rank: int = field(default=8, metadata={"help": "Of the adapter's matrices."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "They are scaled by lora_alpha / rank; by default the rank."}
    )
    lora_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "How the names of the layers to adapt end. By default to_q, to_k, to_v and to_out.0, all attention; of a grown "
            "model also its residual blocks' conv1 and conv2, and text_proj."
        },
    )
    max_train_steps: int = field(default=500, metadata={"help": "Steps to train."})
    train_batch_size: int = field(default=16, metadata={"help": "Images per process and step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Its peak."})
    logit_mean: float | None = field(
        default=None, metadata={"help": "Of logit(sigma), in terms of the core's noise level; by default grow.py's."}
    )
    logit_std: float | None = field(default=None, metadata={"help": "Its standard deviation; by default grow.py's."})
    loss_weighting: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(WEIGHTINGS)}; by default grow.py's, which is by resolution."},
    )
    validation_steps: int = field(default=250, metadata={"help": "Steps between sample grids."})


# What is said of one launch and not of the run: `config.yaml` leaves it out, or using that again would remove a finished run.
OF_ONE_LAUNCH = {"overwrite_output_dir", "resume_from_checkpoint", "resume_with_changes", "plan"}


# What may be different when a run goes on: it changes neither what is trained nor how.
FREE_TO_CHANGE = OF_ONE_LAUNCH | {
    "output_dir",
    "plan_processes",
    "dataloader_num_workers",
    "max_broken_share",
    "text_embeddings_dir",
    "validation_prompts",
    "num_validation_images",
    "num_scored_images",
    "num_inference_steps",
    "guidance_scale",
    "gradient_checkpointing",
    "offload_ema",
    "logging_steps",
    "validation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_license",
    "hub_steps",
    "report_to",
    "sample_steps",
    # These may be split otherwise, as long as the images per step remain the same.
    "train_batch_size",
    "gradient_accumulation_steps",
}

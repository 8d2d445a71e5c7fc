# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
The arguments of `training_examples/`: one dataclass per subject, with the defaults and the help of each field.
`parsing.py` reads them from a YAML file and from flags, and checks them.
"""

from dataclasses import dataclass, field


# The losses that a phase can train on; see `training.objective`.
WEIGHTINGS = ("velocity", "clean", "sigmoid", "sigma_sqrt", "cosmap")
# The optimizers; see `training.optimizer`.
OPTIMIZERS = ("muon", "adamw")
# What torch.compile compiles, and what accelerate's `TorchDynamoPlugin` needs for that.
COMPILATION: dict[str, dict[str, bool]] = {
    "blocks": {"use_regional_compilation": True, "fullgraph": False},
    "model": {"use_regional_compilation": False, "fullgraph": True},
}
# The precisions to compute in.
PRECISIONS = ("no", "bf16", "fp16")
# The steps of a joint phase around a core of our own.
DEFAULT_JOINT_STEPS = 300
# Arguments for which infinity means "off".
UNLIMITED = {"max_grad_norm", "spike_factor"}


@dataclass
class ImageArguments:
    """Captioned images, and how they are read."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub to train on."})
    train_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder to train on: images with a .txt or .caption file beside each or with a metadata.jsonl or metadata.csv, "
            "parquet files, WebDataset tar files, or a dataset saved to disk; or one parquet or tar file. A folder or file at "
            "its top that is named train, validation, val or test is a split."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Name of the column with the images."})
    caption_column: str = field(
        default="text",
        metadata={"help": "Name of the column with the captions. If it holds lists, one caption is drawn per visit."},
    )
    max_broken_share: float = field(
        default=0.01,
        metadata={
            "help": "Largest share of captions, and of images, that may be broken before the run stops. Broken rows are left out "
            "and named in broken_rows.jsonl."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of dataset_name, if it has several."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of dataset_name."})
    train_split: str | None = field(
        default=None, metadata={"help": 'Split to train on. By default, "train" and all that is in no split.'}
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": 'Split to hold out. By default, "validation" or "test"; without one, some images are chosen.'
        },
    )
    max_image_pixels: int = field(
        default=178_956_970,  # the limit from which PIL itself refuses an image
        metadata={
            "help": "Most pixels that an image may have; larger ones count as broken. JPEGs of more than half the default are "
            "decoded at a fraction of their size, so that they need little memory."
        },
    )
    caption_dropout: float = field(
        default=0.1,
        metadata={"help": "Share of captions that are replaced by the empty caption, for classifier-free guidance."},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Number of processes that decode images, per training process."}
    )
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Captions of the sample grid. By default, held-out captions are used."}
    )


@dataclass
class DataArguments(ImageArguments):
    """The data of `grow.py`: captioned shapes, which are drawn when the run starts, unless other data is named."""

    high_res_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of another dataset on the Hub to train on above the core's resolution, and to hold images out from. The "
            "core's data then only needs the core's resolution."
        },
    )
    high_res_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder or file to use instead of high_res_dataset_name, of the same kinds as train_data_dir."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read rows when they are needed, for data that is too large to be put on a disk first."},
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={"help": "Number of rows among which each worker draws the next one when data is streamed."},
    )
    aspect_ratio_buckets: str | None = field(
        default=None,
        metadata={
            "help": 'Heights and widths of images at the final resolution, such as "64,64;48,80;80,48": each training image gets '
            "the nearest shape. By default, all images are square. Held-out images always are."
        },
    )
    horizontal_flip: bool = field(
        default=False,
        metadata={
            "help": "Show the mirror image in half of the visits of a training image, which doubles a small data set. Not for images "
            "with text, nor for captions that say left or right."
        },
    )
    shapes_objects: int = field(
        default=1, metadata={"help": "Largest number of objects in an image of captioned shapes, 1 to 3."}
    )
    shapes_images: int = field(default=20000, metadata={"help": "Number of captioned shapes to draw for training."})
    num_high_res_images: int | None = field(
        default=None,
        metadata={"help": "Train above the core's resolution on this many images only, chosen at random."},
    )
    text_embeddings_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that caches the captions' text embeddings, for a text encoder that does not train. Several runs can "
            "share it."
        },
    )
    num_validation_images: int = field(
        default=256, metadata={"help": "Number of held-out images on which the loss is measured."}
    )
    num_scored_images: int = field(
        default=96,
        metadata={
            "help": "Number of samples per phase that are scored by whether they show their captions, when training on captioned "
            "shapes; 0 turns this off."
        },
    )

    @property
    def has_high_res_data(self) -> bool:
        return self.high_res_dataset_name is not None or self.high_res_data_dir is not None

    @property
    def on_shapes(self) -> bool:
        return self.dataset_name is None and self.train_data_dir is None


@dataclass
class ModelArguments:
    """The core, its text encoder, and the stages that grow around it."""

    core: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a trained pipeline to grow, ours or one of diffusers such as PRXPixelPipeline, which skips "
            "the core phase. Its own architecture and text encoder are used: leave out the arguments that describe them."
        },
    )
    core_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a core on the Hub."})
    variant: str | None = field(
        default=None,
        metadata={
            "help": "Variant of the core's weight files, such as fp16. They train in float32 whatever they are saved in."
        },
    )
    resolutions: list[int] = field(
        default_factory=lambda: [16, 64],
        metadata={"help": "Resolution of the core and then of each stage, in pixels per side."},
    )
    init: str = field(
        default="preserve",
        metadata={"help": 'How a stage starts: "preserve" keeps the core\'s answer; "random" is the paper\'s growth.'},
    )
    patch_size: int = field(default=2, metadata={"help": "Patch size of the core, in pixels per side."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the core's transformer layers."})
    num_layers: int = field(default=6, metadata={"help": "Number of the core's transformer layers."})
    num_attention_heads: int = field(default=2, metadata={"help": "Number of attention heads of each core layer."})
    mlp_ratio: float = field(
        default=4.0, metadata={"help": "Width of the core's feed-forward layers, as a multiple of hidden_size."}
    )
    core_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of values that the core's transformer layers drop while they train, against learning a small data set by "
            "heart; 0.1 is usual."
        },
    )
    random_crop: float = field(
        default=1.0,
        metadata={
            "help": "Smallest share of the sides of a training image that a visit shows. Half of the visits show a part, of random size "
            "and place; the model is told which, so that samples are whole images. By default, 1.0, all show the whole image."
        },
    )
    block_out_channels: list[str] = field(
        default_factory=lambda: ["48,96"],
        metadata={
            "help": 'Channels of each stage, outermost level first, such as "64,128". The last entry is used for all further '
            "stages."
        },
    )
    layers_per_block: int = field(
        default=1, metadata={"help": "Number of residual blocks per entry of block_out_channels."}
    )
    text_encoder: str = field(
        default="small",
        metadata={
            "help": 'Folder or Hub id of a text encoder, which stays frozen; or "small" for a new one that trains with the core.'
        },
    )
    text_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the small text encoder, 128 by default. With another text encoder, it is needed only to plan a run "
            "where that encoder cannot be read."
        },
    )
    text_num_layers: int = field(default=1, metadata={"help": "Number of layers of the small text encoder."})
    max_sequence_length: int = field(
        default=64, metadata={"help": "Number of text tokens that are read; longer captions are truncated."}
    )


@dataclass
class LoopArguments:
    """The settings of a training loop that both scripts have."""

    output_dir: str = field(
        default="output", metadata={"help": "Folder for models, checkpoints, samples and metrics."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an earlier run in output_dir instead of refusing to start."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": 'Checkpoint to resume from: a folder, the name of one of this run such as "core-400", or "latest" for the newest one, if there is any.'
        },
    )
    resume_with_changes: bool = field(
        default=False, metadata={"help": "Resume although arguments differ from those of the checkpoint."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Number of batches whose gradients are accumulated per step."}
    )
    lr_scheduler: str = field(
        default="cosine",
        metadata={"help": "Learning rate schedule of diffusers.optimization, which runs once per phase."},
    )
    lr_warmup_steps: int = field(
        default=100,
        metadata={"help": "Number of warmup steps at the start of each phase, at most a tenth of its steps."},
    )
    adam_beta2: float = field(default=0.99, metadata={"help": "Second beta of AdamW."})
    adam_weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of AdamW, and of the matrices that Muon trains."}
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Norm to which gradients are clipped; 0 turns clipping off."}
    )
    spike_factor: float = field(
        default=20.0,
        metadata={
            "help": "Skip a step whose gradient norm is more than this many times the median of the last 100 accepted ones."
        },
    )
    max_skipped_steps: int = field(
        default=20, metadata={"help": "Stop the run when more than this many steps in a row are skipped."}
    )
    ema_decay: float = field(
        default=0.998, metadata={"help": "Decay of the moving average of the weights, which is saved and sampled."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass, which saves memory."}
    )
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "Attention backend of diffusers, such as _native_cudnn, _native_math or flash. By default, torch chooses. It also "
            "computes attention to the text where a backend takes no mask."
        },
    )
    compile: str | None = field(
        default=None,
        metadata={
            "help": 'What torch.compile compiles, once per phase: "blocks", the repeated blocks of the model, which takes a minute or two; or "model", all that trains as one graph, which takes longer, is divided by DDP, and does not go with FSDP2. By default, it is what `accelerate launch` is configured for.'
        },
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": 'Precision to compute in: "no", "bf16" or "fp16". By default, it is the one that accelerate is configured for.'
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the weights, the data order, the noise and the caption dropout."}
    )
    num_inference_steps: int = field(default=20, metadata={"help": "Number of denoising steps per sample."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Scale of classifier-free guidance for samples."})
    logging_steps: int = field(default=50, metadata={"help": "Number of steps between lines in metrics.jsonl."})
    validation_steps: int = field(default=1000, metadata={"help": "Number of steps between held-out losses."})
    checkpointing_steps: int = field(default=1000, metadata={"help": "Number of steps between checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Number of checkpoints to keep."})
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Publish on the Hub with the token of `hf auth login` or HF_TOKEN. grow.py publishes the pipeline of each "
            "phase under a tag of its name."
        },
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": 'Repository to publish to, such as "user/model", which model cards name too. By default, it is your own repository '
            "with the name of output_dir."
        },
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository on the Hub private."})
    hub_license: str | None = field(
        default=None, metadata={"help": "License to state in model cards, such as apache-2.0."}
    )
    report_to: str | None = field(
        default=None,
        metadata={
            "help": "Tracker of accelerate to report to, such as tensorboard, wandb or trackio; or all, for every installed one."
        },
    )


@dataclass
class TrainingArguments(LoopArguments):
    """
    The steps, rates and noise levels of each phase. Where an argument takes one value per resolution or per stage, the last
    value is used for all further ones.
    """

    plan: bool = field(default=False, metadata={"help": "Print what the run will cost, and stop."})
    plan_processes: int | None = field(
        default=None,
        metadata={"help": "Number of processes to plan for. By default, it is the number of this launch."},
    )
    core_steps: int = field(
        default=1600, metadata={"help": "Number of steps of the core phase; 0 trains the grown model from scratch."}
    )
    detail_steps: list[int] = field(
        default_factory=lambda: [600], metadata={"help": "Number of steps of each stage's detail phase."}
    )
    joint_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": f"Number of steps of each stage's joint phase. By default, it is {DEFAULT_JOINT_STEPS}, or 0 around a model of "
            "diffusers."
        },
    )
    cache_core_predictions: int = field(
        default=0,
        metadata={
            "help": "Number of draws of noise, noise level and caption per training image for which the frozen core is run once, before "
            "the steps of a detail phase, and its predictions are cached on disk; 0 runs the core in each step. For large cores and "
            "small data."
        },
    )
    core_predictions_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for cache_core_predictions. By default, it is core_predictions in output_dir."},
    )
    train_batch_size: list[int] = field(
        default_factory=lambda: [32, 16], metadata={"help": "Images per process and batch, at each resolution."}
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [3e-3, 1.5e-3], metadata={"help": "Peak learning rate at each resolution."}
    )
    optimizer: str = field(
        default="muon",
        metadata={
            "help": 'Optimizer: "muon" for the matrices of attention, MLPs and convolutions, and AdamW for all else; or "adamw". The '
            "same learning rates suit both."
        },
    )
    core_lr_scale: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the inner model in a joint phase, as a multiple of the stage's. By default, it is 0.3, or 1 if the "
            "grown model trains from scratch."
        },
    )
    offload_ema: bool = field(
        default=False,
        metadata={
            "help": "Keep the moving average in CPU memory and copy it to the GPU in every step, which is slow."
        },
    )
    logit_mean: list[float] = field(
        default_factory=lambda: [1.0, -0.7],
        metadata={
            "help": "Mean of logit(sigma) while each resolution trains, in terms of the core's noise level. Held-out losses are "
            "always taken over the noise levels of the first resolution."
        },
    )
    logit_std: list[float] = field(
        default_factory=lambda: [1.0, 1.3],
        metadata={"help": "Standard deviation of logit(sigma) while each resolution trains."},
    )
    loss_weighting: list[str] = field(
        default_factory=lambda: ["velocity", "clean"],
        metadata={
            "help": f"Loss that each resolution trains on, an error or a weighting of noise levels: {', '.join(WEIGHTINGS)}."
        },
    )
    keep_best: bool = field(
        default=False,
        metadata={
            "help": "End each phase with the averaged weights of its lowest held-out loss instead of its last ones. The loss is taken "
            "every validation_steps."
        },
    )
    sample_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of steps between sample grids within a phase. By default, they are drawn only at its end."
        },
    )
    hub_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of steps between uploads of the averaged weights to the branch `training`. By default, there are none."
        },
    )


@dataclass(kw_only=True)
class LoraArguments(ImageArguments, LoopArguments):
    """The arguments of `train_lora.py`: the pipeline to adapt, the adapter, and its training."""

    pretrained_model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the pipeline to adapt."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a pipeline on the Hub."})
    variant: str | None = field(
        default=None, metadata={"help": "Variant of the pipeline's weight files, such as fp16."}
    )
    output_dir: str = field(
        default="output-lora", metadata={"help": "Folder for the adapter, checkpoints, samples and metrics."}
    )
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Resolution to which images are scaled before they are averaged down to the model's, as grow.py does for a "
            "core. By default, it is four times the resolution of a core, and a grown model's own resolution."
        },
    )
    rank: int = field(default=8, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the adapter: its output is multiplied by lora_alpha / rank. By default, it is the rank."
        },
    )
    lora_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Endings of the names of the layers to adapt. By default, they are to_q, to_k, to_v and to_out.0, which is all attention, "
            "with add_k_proj and add_v_proj in DeepFloyd IF, and img_qkv_proj and txt_kv_proj in PRX; in a grown model also conv1 "
            "and conv2 of the residual blocks, and text_proj."
        },
    )
    max_train_steps: int = field(default=500, metadata={"help": "Number of steps to train."})
    train_batch_size: int = field(default=16, metadata={"help": "Images per process and batch."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    logit_mean: float | None = field(
        default=None,
        metadata={
            "help": "Mean of logit(sigma), in terms of the core's noise level. By default, it is that of grow.py."
        },
    )
    logit_std: float | None = field(
        default=None, metadata={"help": "Standard deviation of logit(sigma). By default, it is that of grow.py."}
    )
    loss_weighting: str | None = field(
        default=None,
        metadata={
            "help": f"Loss to train on, an error or a weighting of noise levels: {', '.join(WEIGHTINGS)}. By default, it is that of grow.py, which "
            "depends on the resolution."
        },
    )
    validation_steps: int = field(default=250, metadata={"help": "Number of steps between sample grids."})


# Arguments of a single launch. `config.yaml` leaves them out: a later launch with that file must not remove a finished run.
OF_ONE_LAUNCH = {"overwrite_output_dir", "resume_from_checkpoint", "resume_with_changes", "plan"}


# Arguments that are, or may be, paths: `~` and `$VAR` are expanded in them.
PATHS = {
    "dataset_name",
    "high_res_dataset_name",
    "train_data_dir",
    "high_res_data_dir",
    "text_embeddings_dir",
    "core_predictions_dir",
    "core",
    "text_encoder",
    "pretrained_model_name_or_path",
    "output_dir",
    "resume_from_checkpoint",
}


# Arguments that may differ when a run resumes: they change neither what is trained nor how.
FREE_TO_CHANGE = OF_ONE_LAUNCH | {
    "output_dir",
    "plan_processes",
    "dataloader_num_workers",
    "max_broken_share",
    "text_embeddings_dir",
    "core_predictions_dir",
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
    # How a step's images are split may differ, as long as their number remains the same.
    "train_batch_size",
    "gradient_accumulation_steps",
}


# Arguments that decide which weights `keep_best` keeps. Without it, they are free to change.
OF_EVALUATION = {"validation_steps", "num_validation_images"}

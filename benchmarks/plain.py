# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
A plain model, which trains at the high resolution from the start, as most models in pixel space do. `transformer-8` and
`transformer-16` are transformers on patches of 8 and 16 px (as in JiT, Li & He, 2025), `unet` is diffusers' UNet. They predict
the clean image, and train with the loss, the noise levels and the text encoder of our models. `grow_vs_scratch` runs them as
arms.
"""

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_model, save_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evaluate import draw_images, load_held_out, read_run, score
from benchmarks.queue_of_runs import CORE_LEVELS, MAX_SEQUENCE_LENGTH, STAGE_LEVELS, TEXT_HIDDEN_SIZE
from benchmarks.tables import write_json
from diffusers_greedy_grow import GreedyGrowPipeline, ShallowUNet2DModel
from diffusers_greedy_grow.flow import velocity_from_clean
from diffusers_greedy_grow.models.blocks import GreedyGrowOutput
from diffusers_greedy_grow.training.arguments import LoopArguments, ModelArguments
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.loading import make_loader
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.evaluation import held_out_losses
from diffusers_greedy_grow.training.growing import make_text_encoder
from diffusers_greedy_grow.training.loop import TrainingLoop
from diffusers_greedy_grow.training.objective import FlowObjective
from diffusers_greedy_grow.training.optimizer import count_orthogonalization, find_matrices, split_for_muon
from diffusers_greedy_grow.training.parsing import parse_dataclasses
from diffusers_greedy_grow.training.phases import Phase
from diffusers_greedy_grow.training.run import Run
from diffusers_greedy_grow.training.run_folder import claim_output_dir, find_resumed_phase, find_start
from diffusers_greedy_grow.training.setup import set_attention_backend, set_up
from diffusers_greedy_grow.training.signals import Interrupt
from diffusers_greedy_grow.training.text.captions import CaptionEncoder
from diffusers_greedy_grow.training.trained_model import TrainedModel


# The models, and their usual learning rates.
MODELS = {"transformer-16": 3e-3, "transformer-8": 3e-3, "unet": 1.5e-3}
NUM_LAYERS = 8
# The UNet's channels, in sixteenths of the hidden size: as many parameters as a model grown to 128 px.
UNET_CHANNELS = (2, 4, 8, 15)


@dataclass(kw_only=True)
class PlainArguments(LoopArguments):
    """The arguments of this script."""

    model: str = field(metadata={"help": f"The model: {', '.join(MODELS)}."})
    train_data_dir: str = field(metadata={"help": "Folder with captioned images."})
    resolution: int = field(metadata={"help": "Resolution of the images, in pixels per side."})
    factor: int = field(metadata={"help": "Growth factor to compare with: the shift of the noise levels."})
    steps: int = field(metadata={"help": "Number of steps."})
    hidden_size: int = field(default=128, metadata={"help": "Width of a transformer's layers."})
    batch_size: int = field(default=16, metadata={"help": "Images per step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    text_encoder: str = field(
        default="small", metadata={"help": "Text encoder, which stays frozen; or small for a new one."}
    )
    text_hidden_size: int = field(default=TEXT_HIDDEN_SIZE, metadata={"help": "Width of the text embeddings."})
    max_sequence_length: int = field(default=MAX_SEQUENCE_LENGTH, metadata={"help": "Number of text tokens."})
    scorer: str | None = field(default=None, metadata={"help": "Folder of a trained benchmarks/stickers_scorer."})
    optimizer: str = field(default="adamw", metadata={"help": "Optimizer: adamw or muon."})
    num_validation_images: int = field(default=128, metadata={"help": "Number of held-out images."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Number of processes that decode images."})


# ----------------------------------------------------------------------------------------------------------------------
# The models


class PixelUNet(UNet2DConditionModel):
    """diffusers' UNet as a model of clean images, which is called like ours."""

    @property
    def side_multiple(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        return (self.config.sample_size,)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        return self.sample_sizes

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        **ours: Any,
    ) -> GreedyGrowOutput | tuple[torch.Tensor]:
        embeds = encoder_hidden_states.to(sample.dtype)  # a pretrained encoder may be in float16
        text = {"encoder_hidden_states": embeds, "encoder_attention_mask": encoder_attention_mask}
        clean = super().forward(sample, timestep, **text, return_dict=False)[0].to(sample.dtype)
        velocity = velocity_from_clean(sample, clean, timestep / 1000)
        return GreedyGrowOutput(sample=velocity, pred_original_sample=clean) if return_dict else (velocity,)


def fits(name: str, resolution: int) -> bool:
    """Return whether a model of `MODELS` is left with a grid of at least 8 x 8, as it should be below 128 px."""
    return resolution >= 8 * (8 if name == "unet" else int(name.removeprefix("transformer-")))


def build_model(
    name: str, resolution: int, hidden_size: int, text_hidden_size: int = TEXT_HIDDEN_SIZE
) -> ShallowUNet2DModel | PixelUNet:
    """Build a model of `MODELS` whose first images are gray, as our cores' are. The UNet reads the text at its smallest grid."""
    if name != "unet":
        transformer = ShallowUNet2DModel(
            sample_size=resolution,
            patch_size=int(name.removeprefix("transformer-")),
            hidden_size=hidden_size,
            num_layers=NUM_LAYERS,
            num_attention_heads=hidden_size // 64,
            cross_attention_dim=text_hidden_size,
        )
        transformer.zero_init_output()
        return transformer
    levels = len(UNET_CHANNELS)
    unet = PixelUNet(
        sample_size=resolution,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(hidden_size * share // 16 for share in UNET_CHANNELS),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        cross_attention_dim=text_hidden_size,
        attention_head_dim=hidden_size // 64,  # diffusers takes this for the number of heads
        norm_num_groups=hidden_size // 16,
    )
    for parameter in unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    return unet


@functools.cache
def count_step(
    name: str,
    resolution: int,
    hidden_size: int,
    batch_size: int,
    optimizer: str = "adamw",
    text_hidden_size: int = TEXT_HIDDEN_SIZE,
    num_tokens: int = MAX_SEQUENCE_LENGTH,
) -> int:
    """Count the operations of a training step: forward, backward, and those of Muon."""
    with torch.device("meta"):
        model = build_model(name, resolution, hidden_size, text_hidden_size)
        inputs = torch.empty(1, 3, resolution, resolution), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            output = model(*inputs, torch.empty(1, num_tokens, text_hidden_size))
            output.pred_original_sample.sum().backward()
    matrices = find_matrices(model).values() if optimizer == "muon" else ()
    return batch_size * counter.get_total_flops() + sum(count_orthogonalization(one.shape) for one in matrices)


def build_pipeline(
    arguments: dict[str, Any], captions: Iterable[str] = (), checkpoint: Path | None = None
) -> GreedyGrowPipeline:
    """
    Build a pipeline around a new model, with the shift of a model grown by `factor`. A new tokenizer is trained on `captions`
    unless a `checkpoint` has one.
    """
    names = ("text_encoder", "text_hidden_size", "max_sequence_length")
    text = ModelArguments(**{name: arguments[name] for name in names if name in arguments})
    text_encoder, tokenizer = make_text_encoder(text, captions, checkpoint)
    size = arguments["resolution"], arguments["hidden_size"], text_encoder.config.hidden_size
    return GreedyGrowPipeline(
        unet=build_model(arguments["model"], *size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=float(arguments["factor"])),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        max_sequence_length=text.max_sequence_length,
    )


def gather_trained(pipeline: GreedyGrowPipeline, arguments: dict[str, Any]) -> TrainedModel:
    """Return what trains: the model, and a small text encoder."""
    trains_text = arguments.get("text_encoder", "small") == "small"
    pipeline.text_encoder.requires_grad_(trains_text)
    return TrainedModel(pipeline.unet, pipeline.text_encoder if trains_text else None)


def load_trained(folder: Path, arguments: dict[str, Any]) -> GreedyGrowPipeline:
    """Return the pipeline that a run with these arguments has left in `folder`."""
    pipeline = build_pipeline(arguments, checkpoint=folder)
    load_model(gather_trained(pipeline, arguments), folder / "model.safetensors")
    return pipeline


# ----------------------------------------------------------------------------------------------------------------------
# Training and evaluation


def train(args: PlainArguments, accelerator: Accelerator) -> GreedyGrowPipeline:
    """Train a model, from its last checkpoint on if there is one, and return the pipeline with its averaged weights."""
    output_dir = Path(args.output_dir)
    checkpoint, replaced = find_start(output_dir, args, folders=["checkpoints"])
    rows, held_out = load_captioned_data(None, args.train_data_dir, "image", "text")
    images, validation = (CaptionedImages(one, args.resolution) for one in (rows, held_out))
    pipeline = build_pipeline(vars(args), images.all_captions, checkpoint)
    pipeline.text_encoder.to(accelerator.device)
    set_attention_backend(pipeline.unet, args.attention_backend)
    phase = Phase(
        index=2,  # the same images and noise as a joint phase
        name="plain",
        kind="joint",
        stage=1,
        resolution=args.resolution,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        **{name: values[-1] for name, values in STAGE_LEVELS.items()},
    )
    run = Run(accelerator, output_dir, arguments=(args,), phases=[phase])
    if checkpoint is not None:
        find_resumed_phase(checkpoint, [phase], run.decisive_config, args.resume_with_changes)
    claim_output_dir(output_dir, run.config, replaced, checkpoint, args.resume_with_changes)

    module = gather_trained(pipeline, vars(args)).train()
    groups = [{"params": list(module.parameters()), "lr": args.learning_rate}]
    if args.optimizer == "muon":
        groups = split_for_muon(groups, module)
    interrupt = Interrupt()
    loop = TrainingLoop(run, phase, args, module, groups, interrupt, checkpoint, pipeline.tokenizer)
    encode = CaptionEncoder(pipeline, accelerator.device, trains=module.text_encoder is not None)
    objective = FlowObjective(phase, accelerator, encode, pipeline.unet, float(args.factor), args.seed, 0.1)
    objective.band_factor = args.factor
    loader = make_loader(
        images,
        accelerator,
        phase.batch_size,
        steps_done=loop.step,
        num_steps=phase.steps,
        seed=(args.seed, phase.index),
        gradient_accumulation_steps=1,
        num_workers=args.dataloader_num_workers,
    )
    levels = CORE_LEVELS["logit_mean"][0], CORE_LEVELS["logit_std"][0]
    for step in loop.steps(loader, objective):
        if step.logs:
            run.log(phase, step.number, **loop.means())
        if step.due(args.validation_steps) or step.last:
            with loop.averaged():
                losses = held_out_losses(objective, module, validation, args.num_validation_images, *levels)
            run.log(phase, step.number, **losses)
        if step.interrupted:
            loop.leave()
            sys.exit(interrupt.exit_code)
        if step.saves:
            loop.save()
    loop.finish()
    module.eval()
    return pipeline


def evaluate(pipeline: GreedyGrowPipeline, args: PlainArguments, bfloat16: bool) -> dict[str, Any]:
    """Return the result of a finished run, as `benchmarks.evaluate` does for runs of `grow.py`."""
    images, seconds, curve = read_run(Path(args.output_dir))
    size = args.resolution, args.hidden_size, args.batch_size
    flops = count_step(args.model, *size, args.optimizer, args.text_hidden_size, args.max_sequence_length)
    captions, real = load_held_out(args.train_data_dir, args.resolution)
    return {
        "images": images,
        "seconds": seconds,
        "curve": [{**line, "flops": line["step"] * flops} for line in curve],
        "scores": {"plain": score(draw_images(pipeline, captions, bfloat16), captions, real, args.scorer)},
    }


def main(argv: list[str] | None = None) -> None:
    description = (__doc__ or "").splitlines()[1]
    _, (args,) = parse_dataclasses((PlainArguments,), sys.argv[1:] if argv is None else argv, description)
    if args.model not in MODELS:
        raise ValueError(f"`model={args.model!r}` is unknown: choose one of {', '.join(MODELS)}.")
    accelerator, folder = set_up(args), Path(args.output_dir)
    pipeline = train(args, accelerator)

    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    temporary = folder / "model.tmp"
    save_model(gather_trained(pipeline, vars(args)), str(temporary))
    temporary.replace(folder / "model.safetensors")
    write_json(folder / "result.json", evaluate(pipeline, args, bfloat16=accelerator.mixed_precision == "bf16"))


if __name__ == "__main__":
    main()

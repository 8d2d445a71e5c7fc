# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains a LoRA, a small change to a frozen model, from captioned images.

    accelerate launch training_examples/train_lora.py --pretrained_model_name_or_path output/core \
        --train_data_dir my_images
    accelerate launch training_examples/train_lora.py --pretrained_model_name_or_path user/shapes-64 --revision grown-64 \
        --train_data_dir my_images

A LoRA that was trained on a core, which is cheap, loads into every model grown from it. `output_dir` then holds
`pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(output_dir)`, and the other files of a repository on the Hub.
"""

import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path


if __name__ == "__main__" and "diffusers_greedy_grow" not in sys.modules:
    # Read the arguments before torch is imported, which takes seconds: `--help` and a misspelt flag are answered at once.
    spec = find_spec("diffusers_greedy_grow")
    assert spec is not None and spec.loader is not None
    package = sys.modules[spec.name] = module_from_spec(spec)
    from diffusers_greedy_grow.training.arguments import LoraArguments
    from diffusers_greedy_grow.training.parsing import parse_dataclasses

    parse_dataclasses((LoraArguments,), sys.argv[1:], __doc__.splitlines()[1])
    spec.loader.exec_module(package)

from accelerate import Accelerator
from accelerate.logging import get_logger

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.hub.cards import make_lora_card
from diffusers_greedy_grow.hub.upload import check_license
from diffusers_greedy_grow.hub.weights import hint_at_variant
from diffusers_greedy_grow.training.adapters import (
    ADAPTER_FILE,
    add_adapter,
    keep_the_base_out_of_checkpoints,
    save_adapter,
)
from diffusers_greedy_grow.training.arguments import LoraArguments
from diffusers_greedy_grow.training.curves import draw_losses
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.loading import make_loader
from diffusers_greedy_grow.training.data.rows import BrokenRows
from diffusers_greedy_grow.training.data.sources import Selection, load_captioned_data
from diffusers_greedy_grow.training.errors import run_script
from diffusers_greedy_grow.training.loop import TrainingLoop
from diffusers_greedy_grow.training.objective import FlowObjective, find_training_shift
from diffusers_greedy_grow.training.parsing import parse_lora_arguments
from diffusers_greedy_grow.training.phases import Phase, make_lora_phase
from diffusers_greedy_grow.training.publishing import prepare_publishing, publish_files
from diffusers_greedy_grow.training.run import Run
from diffusers_greedy_grow.training.run_folder import claim_output_dir, find_resumed_phase, find_start, hold_output_dir
from diffusers_greedy_grow.training.samples import draw_grid, draw_in_batches
from diffusers_greedy_grow.training.seeds import sample_generators
from diffusers_greedy_grow.training.setup import (
    compute_dtype,
    set_attention_backend,
    set_up,
    start_trackers,
    warn_of_slow_cpu,
)
from diffusers_greedy_grow.training.sharding import refuse_sharding
from diffusers_greedy_grow.training.signals import Interrupt
from diffusers_greedy_grow.training.text.captions import CaptionEncoder, warn_of_truncated_captions


logger = get_logger(__name__)

SAMPLES = "samples.png"


def main(argv: list[str] | None = None) -> None:
    args = parse_lora_arguments(sys.argv[1:] if argv is None else argv, __doc__.splitlines()[1])
    accelerator = set_up(args)
    refuse_sharding(accelerator)
    warn_of_slow_cpu(accelerator)
    with hold_output_dir(Path(args.output_dir), accelerator):
        train(args, accelerator)


def train(args: LoraArguments, accelerator: Accelerator) -> None:
    """Train the adapter, from the checkpoint that the arguments name on."""
    output_dir = Path(args.output_dir)

    # 1. The folder: whether the run may use it, and the checkpoint to resume from
    if (output_dir / "model_index.json").exists():
        raise ValueError(
            f"`output_dir={args.output_dir!r}` holds a pipeline, whose card this run would replace: name another."
        )
    checkpoint, replaced = find_start(output_dir, args, folders=["checkpoints"])
    if args.push_to_hub and accelerator.is_main_process:
        check_license(args.hub_license)

    # 2. The frozen model in the run's precision, with an adapter; and the noise levels and loss that suit its resolution
    pipeline = load_frozen_pipeline(args, accelerator)
    unet = pipeline.unet
    add_adapter(unet, args)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    set_attention_backend(unet, args.attention_backend)
    phase = make_lora_phase(args, unet)
    run = Run(accelerator, output_dir, arguments=(args,), phases=[phase])
    if checkpoint is not None:
        find_resumed_phase(checkpoint, [phase], run.decisive_config, args.resume_with_changes)

    # 3. The data
    train_data, prompts = load_data(args, accelerator, phase, checkpoint)
    warn_of_truncated_captions(pipeline, train_data.captions[:1000])
    repo_id = args.hub_model_id or (output_dir.resolve().name if args.push_to_hub else str(output_dir))
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = prepare_publishing(args)

    # 4. The start. `claim_output_dir` makes the folder this run's
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim_output_dir(output_dir, run.config, replaced, checkpoint, args.resume_with_changes)
        rows = {"base": draw(pipeline, prompts, args, accelerator)}  # a new adapter changes nothing
    start_trackers(accelerator, "train_lora", run.config)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    trained, everything = sum(parameter.numel() for parameter in parameters), unet.num_parameters()
    logger.info(f"{len(train_data)} images; {trained / 1e6:.2f} M of {everything / 1e6:.2f} M parameters train.")
    keep_the_base_out_of_checkpoints(accelerator, unet)
    groups = [{"params": parameters, "lr": phase.learning_rate}]
    interrupt = Interrupt()
    loop = TrainingLoop(run, phase, args, unet, groups, interrupt, checkpoint)
    encode = CaptionEncoder(pipeline, accelerator.device)
    objective = FlowObjective(
        phase, accelerator, encode, unet, find_training_shift(pipeline), args.seed, args.caption_dropout
    )
    loader = make_loader(
        train_data,
        accelerator,
        phase.batch_size,
        steps_done=loop.step,
        num_steps=phase.steps,
        seed=(args.seed, phase.index),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_workers=args.dataloader_num_workers,
    )

    def draw_row() -> None:
        with loop.averaged():
            rows["LoRA"] = draw(pipeline, prompts, args, accelerator)
        draw_grid(rows, prompts, output_dir / SAMPLES)

    # 5. The steps
    for step in loop.steps(loader, objective):
        if step.logs:
            run.log(phase, step.number, **loop.means())
        if step.interrupted:
            loop.leave()
            sys.exit(interrupt.exit_code)
        if step.saves:
            loop.save()
        if step.due(args.validation_steps) and not step.last and accelerator.is_main_process:
            draw_row()

    # 6. The result: the averaged weights
    if accelerator.is_main_process:
        draw_row()
        loop.finish()
        draw_losses(run.metrics_path, output_dir / "loss.png")
        save_adapter(unet, output_dir)
        write_lora_card(args, run, phase, repo_id, prompts[0])
        logger.info(f"Done: {output_dir / ADAPTER_FILE}, images in {output_dir / SAMPLES}.")
        if args.push_to_hub:
            paths = [output_dir / name for name in (ADAPTER_FILE, SAMPLES, "README.md")]
            publish_files(paths, repo_id, commit_message="Upload LoRA weights")
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------------------------------
# What is trained, and on what


def load_frozen_pipeline(args: LoraArguments, accelerator: Accelerator) -> GreedyGrowPipeline:
    """Load the pipeline to adapt. Raise a `ValueError` if it cannot be loaded, or has no text encoder."""
    name = f"`pretrained_model_name_or_path={args.pretrained_model_name_or_path!r}`"
    try:
        pipeline = GreedyGrowPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            dtype=compute_dtype(accelerator),
        ).to(accelerator.device)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}{hint_at_variant(error)}") from error
    if pipeline.text_encoder is None:
        raise ValueError(
            f"{name} has no text encoder, but `train_lora.py` trains on captions: name a pipeline that has one."
        )
    pipeline.text_encoder.requires_grad_(False)
    return pipeline


def load_data(
    args: LoraArguments, accelerator: Accelerator, phase: Phase, checkpoint: Path | None
) -> tuple[CaptionedImages, list[str]]:
    """Load the images, averaged down to the model's resolution, and choose the prompts of the sample grid."""
    resolution = args.resolution or phase.resolution * (1 if phase.stage else 4)
    if resolution % phase.resolution:
        raise ValueError(f"`resolution={resolution}` must be a multiple of the model's {phase.resolution}.")
    train_rows, validation_rows = load_captioned_data(
        args.dataset_name,
        args.train_data_dir,
        args.image_column,
        args.caption_column,
        hold_out=False,
        selection=Selection.from_arguments(args),
    )
    broken = BrokenRows(Path(args.output_dir) / "broken_rows.jsonl", args.max_broken_share)
    if checkpoint is None and accelerator.is_main_process:
        broken.forget()
    accelerator.wait_for_everyone()
    options: dict = {"broken": broken, "max_image_pixels": args.max_image_pixels}
    train_data = CaptionedImages(train_rows, resolution, **options).at(phase.resolution)
    shown = CaptionedImages(validation_rows, resolution, **options) if len(validation_rows) else train_data
    return train_data, args.validation_prompts or list(dict.fromkeys(shown.captions))[:8]


def draw(pipeline: GreedyGrowPipeline, prompts: list[str], args: LoraArguments, accelerator: Accelerator) -> list:
    """Draw one image per prompt, from the same noise each time."""
    generators = sample_generators((args.seed, 1), 0, len(prompts))  # the keys of training begin with (seed, 0)
    return draw_in_batches(pipeline, prompts, accelerator, args, generator=generators)


def write_lora_card(args: LoraArguments, run: Run, phase: Phase, repo_id: str, prompt: str) -> None:
    """Write the model card of the adapter."""
    images = phase.steps * run.images_per_step(phase)
    make_lora_card(
        repo_id,
        args.pretrained_model_name_or_path,
        args.revision,
        prompt=prompt,
        samples=SAMPLES,
        trained=f"rank {args.rank}, {phase.steps} steps, {images} images seen, seed {args.seed}",
        license=args.hub_license,
        datasets=[args.dataset_name] if args.dataset_name else None,
    ).save(run.output_dir / "README.md")


if __name__ == "__main__":
    run_script(main)

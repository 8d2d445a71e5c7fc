# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Grows a text-to-image model in pixel space, from captioned images to a pipeline.

    accelerate launch training_examples/grow.py                                       # captioned shapes, 16 -> 64 px
    accelerate launch training_examples/grow.py --train_data_dir my_images --resolutions 32 128

A run goes through phases (Vasconcelos et al., 2024, section 4): `core` trains a Shallow-UViT at the first resolution;
then, for each further resolution, a stage is grown around it, trained alone (`detail`), and trained together with what
is inside it (`joint`). After each phase `output_dir` holds one more complete pipeline.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec
from pathlib import Path


if __name__ == "__main__" and "diffusers_greedy_grow" not in sys.modules:
    # Read the arguments before torch is imported, which takes seconds: `--help` and a misspelt flag are answered at once.
    spec = find_spec("diffusers_greedy_grow")
    assert spec is not None and spec.loader is not None
    package = sys.modules[spec.name] = module_from_spec(spec)
    from diffusers_greedy_grow.training.arguments import DataArguments, ModelArguments, TrainingArguments
    from diffusers_greedy_grow.training.parsing import parse_dataclasses

    parse_dataclasses((DataArguments, ModelArguments, TrainingArguments), sys.argv[1:], __doc__.splitlines()[1])
    spec.loader.exec_module(package)

from accelerate import Accelerator
from accelerate.logging import get_logger

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.pipelines.foreign import describe_foreign
from diffusers_greedy_grow.training.arguments import DataArguments, ModelArguments, TrainingArguments
from diffusers_greedy_grow.training.core_predictions.computing import CachedObjective, cache_core_predictions
from diffusers_greedy_grow.training.core_predictions.planning import (
    announce_caching,
    check_caching,
    find_predictions_folder,
)
from diffusers_greedy_grow.training.core_predictions.store import CorePredictions
from diffusers_greedy_grow.training.curves import draw_losses
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.loading import TrainingData, load_training_data, make_loader
from diffusers_greedy_grow.training.data.rows import BrokenRows
from diffusers_greedy_grow.training.data.sources import write_shapes_once
from diffusers_greedy_grow.training.data.streaming import StreamedImages
from diffusers_greedy_grow.training.errors import run_script
from diffusers_greedy_grow.training.evaluation import format_scores, held_out_losses, score_shapes
from diffusers_greedy_grow.training.files import save_pipeline
from diffusers_greedy_grow.training.growing import (
    adopt_core,
    build_core_pipeline,
    get_core_resolution,
    grow_pipeline,
    load_pipeline,
    warn_of_few_images,
    warn_of_missing_detail,
)
from diffusers_greedy_grow.training.loop import TrainingLoop
from diffusers_greedy_grow.training.nearest import NearestImages
from diffusers_greedy_grow.training.objective import FlowObjective, find_training_shift
from diffusers_greedy_grow.training.optimizer import split_for_muon
from diffusers_greedy_grow.training.parsing import parse_arguments
from diffusers_greedy_grow.training.phases import Phase, list_phases
from diffusers_greedy_grow.training.plan import PhasePlan, plan_phases
from diffusers_greedy_grow.training.publishing import Publisher, write_phase_card
from diffusers_greedy_grow.training.run import Run
from diffusers_greedy_grow.training.run_folder import claim_output_dir, find_resumed_phase, find_start, hold_output_dir
from diffusers_greedy_grow.training.samples import Samples
from diffusers_greedy_grow.training.setup import set_attention_backend, set_up, start_trackers, warn_of_slow_cpu
from diffusers_greedy_grow.training.sharding import consolidate, set_up_sharding, shard
from diffusers_greedy_grow.training.signals import Interrupt
from diffusers_greedy_grow.training.text.captions import CaptionEncoder, warn_of_truncated_captions
from diffusers_greedy_grow.training.text.embeddings import TextEmbeddings, embed_captions
from diffusers_greedy_grow.training.trained_model import TrainedModel


logger = get_logger(__name__)


@dataclass
class Session:
    """Everything that the phases share."""

    run: Run
    data_args: DataArguments
    model_args: ModelArguments
    args: TrainingArguments
    data: TrainingData
    samples: Samples
    nearest: NearestImages
    interrupt: Interrupt
    embeddings: TextEmbeddings | None  # of all captions, if they are cached
    publisher: Publisher | None  # on the main process, if the run is published


def main(argv: list[str] | None = None) -> None:
    data_args, model_args, args = parse_arguments(sys.argv[1:] if argv is None else argv, __doc__.splitlines()[1])
    accelerator = set_up(args)
    set_up_sharding(accelerator, args)

    # 1. The plan: what each phase will cost
    if model_args.core is not None:
        adopt_core(model_args, args)
    check_caching(args, data_args, model_args, accelerator)
    phases = list_phases(model_args, args)
    plans, text = plan_phases(phases, data_args, model_args, args, accelerator)
    logger.info(text)
    if args.plan:
        return
    warn_of_slow_cpu(accelerator)
    with hold_output_dir(Path(args.output_dir), accelerator):
        train(accelerator, data_args, model_args, args, phases, plans)


def train(
    accelerator: Accelerator,
    data_args: DataArguments,
    model_args: ModelArguments,
    args: TrainingArguments,
    phases: list[Phase],
    plans: list[PhasePlan],
) -> None:
    """Train the `phases`, from the checkpoint that the arguments name on."""
    # 2. The folder and the repository: whether the run may use them, and the checkpoint to resume from
    output_dir = Path(args.output_dir)
    names = [phase.name for phase in phases]
    checkpoint, replaced = find_start(
        output_dir, args, folders=["checkpoints", "samples", "uploads"], pipelines=names, core=model_args.core
    )
    publisher = None
    if args.push_to_hub and accelerator.is_main_process:
        publisher = Publisher(args, on_branch=args.hub_steps is not None)

    # 3. The data
    data, broken = load_data(data_args, model_args, args, accelerator, checkpoint)
    warn_of_missing_detail(data.measured, model_args.resolutions)
    if phases[0].name == "core" and isinstance(data.core, CaptionedImages):
        warn_of_few_images(data.core, data.validation, args.keep_best)
    run = Run(
        accelerator=accelerator,
        output_dir=output_dir,
        arguments=(data_args, model_args, args),
        phases=phases,
        plans=plans,
        fingerprint=data.fingerprint,
    )
    captions = data_args.validation_prompts or data.validation.captions[:8]
    samples = Samples(run, args, captions, resolution=model_args.resolutions[-1])

    # 4. The start: a new core, a given one, or the last finished phase. `claim_output_dir` makes the folder this run's
    first = 0
    if checkpoint is not None:
        first = find_resumed_phase(checkpoint, phases, run.decisive_config, args.resume_with_changes)
    pipeline = start_pipeline(run, model_args, data, first, checkpoint, args.seed)
    if args.cache_core_predictions:
        announce_caching(plans[first:], args, data, pipeline)
    warn_of_truncated_captions(pipeline, data.validation.captions[:1000])
    set_attention_backend(pipeline.unet, args.attention_backend)  # fails if it is not installed
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim_output_dir(output_dir, run.config, replaced, checkpoint, args.resume_with_changes)
    start_trackers(accelerator, "grow", run.config)
    embeddings = None
    if data_args.text_embeddings_dir is not None:
        embeddings = embed_captions(pipeline, accelerator, data, data_args, args.seed)

    # 5. The phases. From here on Ctrl-C saves a checkpoint; before, there is nothing to save
    nearest = NearestImages(output_dir / "nearest.png", data, args.seed)
    session = Session(run, data_args, model_args, args, data, samples, nearest, Interrupt(), embeddings, publisher)
    if publisher is not None and checkpoint is not None:
        publisher.push_missing(names[:first], output_dir)
    scores = {}
    for phase in phases[first:]:
        if phase.resolution != pipeline.unet.config.sample_size:
            pipeline = grow_pipeline(pipeline, phase, model_args, data.measured, args.seed)
        train_phase(session, phase, pipeline, checkpoint)
        checkpoint = None
        if accelerator.is_main_process:
            if found := broken.found():
                logger.warning(f"{found} broken rows were left out so far: {broken.path} names them.")
            if ignored := broken.found("ignored"):
                logger.warning(f"{ignored} images have color profiles that cannot be used: {broken.path} names them.")
            scores[phase.name] = finish_phase(session, phase, pipeline)
        accelerator.wait_for_everyone()
        if accelerator.is_fsdp2 and phase is not phases[-1]:  # the weights are whole on the main process only
            pipeline = load_pipeline(output_dir / phase.name)

    if any(scores.values()):
        logger.info(format_scores(scores))
    if publisher is not None:
        publisher.wait()
    accelerator.end_training()


def load_data(
    data_args: DataArguments,
    model_args: ModelArguments,
    args: TrainingArguments,
    accelerator: Accelerator,
    checkpoint: Path | None,
) -> tuple[TrainingData, BrokenRows]:
    """Load the images, or draw captioned shapes if no data is named. Also return the counter of broken rows."""
    output_dir, train_data_dir = Path(args.output_dir), data_args.train_data_dir
    if data_args.on_shapes:
        with accelerator.main_process_first():
            cells = get_core_resolution(model_args)  # a given core has learned textures of its own resolution
            train_data_dir = write_shapes_once(data_args, model_args.resolutions, cells, args.seed, output_dir)
    broken = BrokenRows(output_dir / "broken_rows.jsonl", data_args.max_broken_share)
    if checkpoint is None and accelerator.is_main_process:
        broken.forget()
    accelerator.wait_for_everyone()
    data = load_training_data(
        data_args, model_args.resolutions, train_data_dir, broken, args.seed, model_args.random_crop
    )
    logger.info(data.describe())
    return data, broken


def start_pipeline(
    run: Run, model_args: ModelArguments, data: TrainingData, first: int, checkpoint: Path | None, seed: int
) -> GreedyGrowPipeline:
    """
    Return the pipeline that phase number `first` of the run starts from. One of diffusers is already grown to that phase's
    resolution.

    Raises:
        `ValueError`: if the phase before it left no pipeline.
    """
    if first == 0:
        if model_args.core is not None:
            if describe_foreign(model_args.core, model_args.core_revision) is not None:
                return grow_pipeline(
                    model_args.core, run.phases[0], model_args, data.measured, seed, model_args.core_revision
                )
            given = model_args.core, model_args.core_revision, model_args.variant
            return load_pipeline(*given, dropout=model_args.core_dropout)
        return build_core_pipeline(model_args, data.core.all_captions, checkpoint)
    start = run.output_dir / run.phases[first - 1].name
    if not start.exists():
        raise ValueError(
            f"{checkpoint} resumes from {start}, which is not there: train that phase with the others, in another "
            "`output_dir`, or leave out its steps."
        )
    return load_pipeline(start, dropout=model_args.core_dropout)


def train_phase(session: Session, phase: Phase, pipeline: GreedyGrowPipeline, checkpoint: Path | None) -> None:
    """
    Train one phase, from `checkpoint` if there is one, and leave the averaged weights in `pipeline`. If a signal interrupts the
    run, save a checkpoint and exit.
    """
    run, args, data_args, publisher = session.run, session.args, session.data_args, session.publisher
    accelerator, unet, text_encoder = run.accelerator, pipeline.unet, pipeline.text_encoder

    # 1. What trains: the part of the model that the phase does not freeze; in the first phase also a new text encoder
    is_new = session.model_args.text_encoder == "small" and session.model_args.core is None
    trains_text = is_new and phase is run.phases[0]
    text_encoder.to(accelerator.device if session.embeddings is None else "cpu")
    text_encoder.requires_grad_(trains_text)
    unet.train()
    phase.freeze(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    set_attention_backend(unet, args.attention_backend)
    if phase.kind == "core":
        groups = [{"name": "core", "params": list(unet.parameters()), "lr": phase.learning_rate}]
    else:
        groups = unet.parameter_groups(phase.learning_rate, args.core_lr_scale)
    if trains_text:
        groups.append({"name": "text", "params": list(text_encoder.parameters()), "lr": phase.learning_rate})
    module = TrainedModel(unet, text_encoder if trains_text else None)
    if args.optimizer == "muon":
        groups = split_for_muon(groups, module)
    shard(accelerator, module, pipeline)
    tokenizer = pipeline.tokenizer if trains_text else None
    loop = TrainingLoop(
        run, phase, args, module, groups, session.interrupt, checkpoint, tokenizer, args.offload_ema, args.keep_best
    )

    # 2. The loss and the data
    encode = CaptionEncoder(pipeline, accelerator.device, trains_text, session.embeddings)
    objective, images = make_objective(session, phase, pipeline, encode)
    loader = make_loader(
        images,
        accelerator,
        phase.batch_size,
        steps_done=loop.step,
        num_steps=phase.steps,
        seed=(args.seed, phase.index),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_workers=data_args.dataloader_num_workers,
        state=loop.data_state,
    )
    # Held-out losses use the first resolution's noise levels in all phases, so that phases compare.
    held_out = session.data.validation, data_args.num_validation_images, args.logit_mean[0], args.logit_std[0]

    # 3. The steps
    for step in loop.steps(loader, objective):
        if step.logs:
            run.log(phase, step.number, **loop.means())
        if step.due(args.validation_steps) or step.last:
            with loop.averaged():
                losses = held_out_losses(objective, module, *held_out)
            run.log(phase, step.number, **losses)
            loop.note_losses(losses)
        if step.interrupted:
            loop.leave()
            if publisher is not None:
                publisher.leave()
            sys.exit(session.interrupt.exit_code)
        if step.saves:
            loop.save()
        if step.due(args.sample_steps) and not step.last:
            with loop.averaged():
                consolidate(accelerator, module, pipeline)
                if accelerator.is_main_process:
                    session.samples.draw_step(phase, step.number, pipeline)
            accelerator.wait_for_everyone()
        if step.due(args.hub_steps) and not step.last:
            with loop.averaged():
                consolidate(accelerator, module, pipeline)
                if publisher is not None:
                    phase.record(pipeline.unet, step.number, run.images_per_step(phase), args.seed)
                    publisher.push_step(phase.name, step.number, pipeline)

    # 4. The result: the averaged weights, of the last step or of the lowest held-out loss
    kept = loop.finish()
    if kept:
        run.log(phase, phase.steps, **kept)
    unet.disable_gradient_checkpointing()
    consolidate(accelerator, module, pipeline)
    for component in (pipeline.unet, pipeline.text_encoder):
        component.requires_grad_(False).eval()
    phase.record(pipeline.unet, phase.steps, run.images_per_step(phase), args.seed, **kept)
    accelerator.free_memory()


def make_objective(
    session: Session, phase: Phase, pipeline: GreedyGrowPipeline, encode: CaptionEncoder
) -> tuple[FlowObjective, CaptionedImages | StreamedImages | CorePredictions]:
    """Return the loss of a phase, and the images that it trains on, with the core's predictions if these are cached."""
    args, accelerator = session.args, session.run.accelerator
    images = session.data.at(phase.stage, phase.resolution)
    shift, dropout = find_training_shift(pipeline), session.data_args.caption_dropout
    arguments = phase, accelerator, encode, pipeline.unet, shift, args.seed, dropout
    if not args.cache_core_predictions or phase.kind != "detail":
        return FlowObjective(*arguments), images
    assert isinstance(images, CaptionedImages)
    objective = CachedObjective(*arguments, num_draws=args.cache_core_predictions)
    predictions = cache_core_predictions(
        pipeline,
        images,
        objective,
        session.run.images_per_step(phase),
        find_predictions_folder(args),
        session.run.fingerprint,
        session.data_args.dataloader_num_workers,
        session.interrupt,
    )
    return objective, predictions


def finish_phase(session: Session, phase: Phase, pipeline: GreedyGrowPipeline) -> dict[str, float]:
    """Save the pipeline of a phase, draw its samples and its losses, score and publish it. Return the scores, if any."""
    run, args, data_args = session.run, session.args, session.data_args
    samples, publisher = session.samples, session.publisher
    folder, scores = run.output_dir / phase.name, {}
    save_pipeline(pipeline, folder)
    pipeline.to(run.accelerator.device)
    drawn = samples.add_row(phase, pipeline)
    distances = session.nearest.draw(phase, drawn)
    if distances:
        run.log(phase, phase.steps, **distances)
    draw_losses(run.metrics_path, run.output_dir / "loss.png")
    logger.info(f"{phase.name} is done: {folder}, images in {run.output_dir / 'samples.png'}.")
    if data_args.on_shapes and data_args.num_scored_images:
        captions = session.data.validation.captions[: data_args.num_scored_images]
        images = samples.draw(pipeline, captions)
        scores = score_shapes(images, captions, samples.resolution, texture_cells=pipeline.unet.sample_sizes[0])
        run.log(phase, phase.steps, **{f"score_{name}": value for name, value in scores.items()})
    repo_id = publisher.repo_id if publisher is not None else args.hub_model_id or str(folder)
    tag = phase.name if args.push_to_hub else None
    gallery = list(zip(samples.captions, drawn))
    write_phase_card(folder, pipeline, repo_id, gallery, scores, data_args, license=args.hub_license, tag=tag)
    if publisher is not None:
        publisher.push_phase(phase.name, folder)
    return scores


if __name__ == "__main__":
    run_script(main)

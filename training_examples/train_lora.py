# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains a LoRA, a small change to a frozen model, from captioned images:

    accelerate launch training_examples/train_lora.py --pretrained_model_name_or_path output/core \
        --train_data_dir my_images
    accelerate launch training_examples/train_lora.py --pretrained_model_name_or_path user/shapes-64 --revision grown-64 \
        --train_data_dir my_images

One that was trained on a core, which is cheap, loads into every model grown from it. `output_dir` then holds
`pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(output_dir)`, and what a repository on the Hub needs besides.
"""

import json
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel, _collate_lora_metadata, cast_training_params
from huggingface_hub.utils import disable_progress_bars
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm.auto import tqdm

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.hub.cards import make_lora_card
from diffusers_greedy_grow.hub.publish import new_upload_folder
from diffusers_greedy_grow.hub.upload import UploadError, check_license, prepare_repository, upload
from diffusers_greedy_grow.training.arguments import FREE_TO_CHANGE, OF_ONE_LAUNCH, LoraArguments, TrainingArguments
from diffusers_greedy_grow.training.checkpoints import check_changes, load_checkpoint, read_progress, save_checkpoint
from diffusers_greedy_grow.training.curves import draw_losses
from diffusers_greedy_grow.training.data.images import CaptionedImages, normalize
from diffusers_greedy_grow.training.data.order import EpochOrder
from diffusers_greedy_grow.training.data.rows import BrokenRows
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.ema import averaged
from diffusers_greedy_grow.training.guard import GradientGuard
from diffusers_greedy_grow.training.loop import make_optimizer, save_interrupted, take_step
from diffusers_greedy_grow.training.objective import LossMeter, draw_noise, flow_loss
from diffusers_greedy_grow.training.parsing import parse_lora_arguments
from diffusers_greedy_grow.training.run_folder import check_replaced, claim_output_dir, find_start
from diffusers_greedy_grow.training.samples import draw_samples
from diffusers_greedy_grow.training.seeds import sample_generators
from diffusers_greedy_grow.training.setup import (
    check_cpu,
    compute_dtype,
    set_attention_backend,
    set_up,
    start_trackers,
)
from diffusers_greedy_grow.training.signals import Interrupt, leave_signals_to_the_parent
from diffusers_greedy_grow.training.text.captions import encode_captions, warn_of_cut_captions


logger = get_logger(__name__)

WEIGHTS, SAMPLES = "pytorch_lora_weights.safetensors", "samples.png"


# ----------------------------------------------------------------------------------------------------------------------
# The adapter


def add_adapter(unet: torch.nn.Module, args: LoraArguments) -> list[tuple[str, torch.nn.Parameter]]:
    """Freezes the model, adds an adapter in float32, and returns its parameters, which are all that trains."""
    names = [f".{name}" for name, _ in unet.named_modules()]
    if args.lora_layers is not None:
        layers = args.lora_layers
        missing = [layer for layer in layers if not any(name.endswith(f".{layer}") for name in names)]
        if missing:
            raise ValueError(f"`lora_layers={layers}`: no name of a layer of the model ends in {missing}.")
    else:
        layers = ["to_q", "to_k", "to_v", "to_out.0"]  # all attention; the core's is in all that grows from it
        if len(unet.sample_sizes) > 1:
            layers += ["conv1", "conv2", "text_proj"]
    unet.requires_grad_(False)
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=alpha, target_modules=layers))
    cast_training_params(unet, dtype=torch.float32)
    return [(name, parameter) for name, parameter in unet.named_parameters() if parameter.requires_grad]


def save_adapter(unet: torch.nn.Module, folder: Path) -> None:
    temporary = f"{WEIGHTS}.tmp.safetensors"
    GreedyGrowPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(unet), weight_name=temporary, **_collate_lora_metadata({"unet": unet})
    )
    (folder / temporary).replace(folder / WEIGHTS)


def keep_the_base_out_of_checkpoints(accelerator: Accelerator, unet: torch.nn.Module) -> None:
    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_adapter(unet, Path(folder))

    def load(models: list, folder: str) -> None:
        models.clear()
        layers = GreedyGrowPipeline.lora_state_dict(folder, weight_name=WEIGHTS)
        set_peft_model_state_dict(unet, {name.removeprefix("unet."): value for name, value in layers.items()})

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


# ----------------------------------------------------------------------------------------------------------------------
# The result


def draw(pipeline: GreedyGrowPipeline, prompts: list[str], args: LoraArguments, accelerator) -> list[Image.Image]:
    """One image for each prompt, from the same noise each time."""
    generators = sample_generators((args.seed, 1), 0, len(prompts))  # training's begin with (seed, 0)
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    images = []
    for start in range(0, len(prompts), 32):
        some = slice(start, start + 32)
        with accelerator.autocast():
            images += pipeline(prompts[some], generator=generators[some], **settings).images
    return images


def publish(output_dir: Path, repo_id: str) -> None:
    """Uploads what a user of the adapter needs; a failure is logged, with the folder that everything is in."""
    folder = new_upload_folder(repo_id)
    for name in (WEIGHTS, SAMPLES, "README.md"):
        shutil.copy(output_dir / name, folder)
    try:
        upload(folder, repo_id, commit_message="Upload LoRA weights")
    except UploadError as error:
        logger.error(str(error))
    else:
        shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> None:
    args = parse_lora_arguments(sys.argv[1:] if argv is None else argv, __doc__.splitlines()[1])
    output_dir = Path(args.output_dir)
    accelerator = set_up(args)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"An adapter does not train with `{accelerator.distributed_type.value}`, nor does it need to, as small as it is: use "
            "`accelerate launch --config_file training_examples/accelerate/ddp.yaml`."
        )
    check_cpu(accelerator)
    device = accelerator.device

    # 1. Where it goes, or goes on
    if (output_dir / "model_index.json").exists():
        raise ValueError(
            f"`output_dir={args.output_dir!r}` holds a pipeline, and this run another card: name another."
        )
    checkpoint = find_start(output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    if checkpoint is None:
        check_replaced(output_dir, ["checkpoints"])
    images_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    config = {name: value for name, value in asdict(args).items() if name not in OF_ONE_LAUNCH}
    decisive = {name: value for name, value in config.items() if name not in FREE_TO_CHANGE}
    decisive |= {"images per step": images_per_step, "mixed_precision": accelerator.mixed_precision}
    progress = {"step": 0}
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        check_changes(checkpoint, progress["config"], decisive, args.resume_with_changes)
        if progress["step"] > args.max_train_steps:
            raise ValueError(f"{checkpoint} is after the {args.max_train_steps} steps that this run has now.")
    if args.push_to_hub and accelerator.is_main_process:
        check_license(args.hub_license)

    # 2. The model, frozen and in low precision if any, with an adapter; and how its resolution trains
    pipeline = GreedyGrowPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, dtype=compute_dtype(accelerator)
    ).to(device)
    if pipeline.text_encoder is None:
        raise ValueError(
            f"`pretrained_model_name_or_path={args.pretrained_model_name_or_path!r}` has no text, but `train_lora.py` trains "
            "on captions: name a pipeline with a text encoder."
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.requires_grad_(False)
    unet, shift = pipeline.unet, pipeline.scheduler.config.shift
    named_parameters = add_adapter(unet, args)
    parameters = [parameter for _, parameter in named_parameters]
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    set_attention_backend(unet, args.attention_backend)
    is_grown = len(unet.sample_sizes) > 1
    band_factor = unet.sample_sizes[-1] // unet.sample_sizes[-2] if is_grown else 2
    *levels, weighting = (
        getattr(TrainingArguments(), name)[is_grown] if getattr(args, name) is None else getattr(args, name)
        for name in ("logit_mean", "logit_std", "loss_weighting")
    )

    # 3. Data, in an order that depends on the seed alone
    resolution = args.resolution or unet.config.sample_size * (1 if is_grown else 4)
    if resolution % unet.config.sample_size:
        raise ValueError(f"`resolution={resolution}` must be a multiple of the model's {unet.config.sample_size}.")
    train_rows, validation_rows = load_captioned_data(
        args.dataset_name, args.train_data_dir, args.image_column, args.caption_column, hold_out=False
    )
    broken = BrokenRows(output_dir / "broken_rows.jsonl", args.max_broken_share)
    if checkpoint is None and accelerator.is_main_process:
        broken.path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    train_data = CaptionedImages(train_rows, resolution, broken=broken).at(unet.config.sample_size)
    shown = CaptionedImages(validation_rows, resolution, broken=broken) if len(validation_rows) else train_data
    prompts = args.validation_prompts or list(dict.fromkeys(shown.captions))[:8]
    warn_of_cut_captions(pipeline, train_data.captions[:1000])
    first, total = (step * images_per_step for step in (progress["step"], args.max_train_steps))
    order = EpochOrder(len(train_data), start=first, num_samples=total - first, seed=(args.seed, 0))
    loader = torch.utils.data.DataLoader(
        train_data,
        batch_size=args.train_batch_size,
        sampler=order,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_parent,
    )

    # 4. Where it is published
    repo_id = args.hub_model_id or (output_dir.resolve().name if args.push_to_hub else str(output_dir))
    if args.push_to_hub and accelerator.is_main_process:
        disable_progress_bars()
        repo_id = prepare_repository(repo_id, private=args.hub_private_repo or None)

    # 5. From here on the folder holds this run
    metrics_path = output_dir / "metrics.jsonl"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim_output_dir(output_dir, config, ["checkpoints"], checkpoint, args.resume_with_changes)
        rows = {"base": draw(pipeline, prompts, args, accelerator)}  # a new adapter changes nothing
    start_trackers(accelerator, "train_lora", config)

    # 6. What trains
    trained, everything = sum(parameter.numel() for parameter in parameters), unet.num_parameters()
    logger.info(f"{len(train_data)} images; {trained / 1e6:.2f} M of {everything / 1e6:.2f} M parameters train.")
    groups = [{"params": parameters, "lr": args.learning_rate}]
    optimizer, lr_scheduler = make_optimizer(args, groups, args.max_train_steps)
    keep_the_base_out_of_checkpoints(accelerator, unet)
    model, optimizer, lr_scheduler, loader = accelerator.prepare(unet, optimizer, lr_scheduler, loader)
    guard = GradientGuard(args.spike_factor, args.max_skipped_steps)
    if checkpoint is not None:
        logger.info(f"Going on from {checkpoint}.")
        ema, losses = load_checkpoint(accelerator, checkpoint, named_parameters, args.ema_decay)
        meter = LossMeter(losses)
        guard.load_state_dict(progress["guard"])
    else:
        ema, meter = EMAModel(parameters, decay=args.ema_decay, foreach=True), LossMeter()
    ema.to(device)

    # 7. The loop
    def draw_grid() -> None:
        with averaged(ema, parameters):
            rows["LoRA"] = draw(pipeline, prompts, args, accelerator)
        draw_samples(rows, prompts, output_dir / SAMPLES)

    def save(step: int) -> Path:
        size = metrics_path.stat().st_size if metrics_path.exists() else 0
        state = {
            "phase": "lora",
            "phase_index": 0,
            "step": step,
            "config": decisive,
            "guard": guard.state_dict(),
            "metrics_size": size,
        }
        folder, limit = output_dir / "checkpoints", args.checkpoints_total_limit
        return save_checkpoint(accelerator, folder, state, ema, named_parameters, meter.gather(accelerator), limit)

    interrupt, step = Interrupt(), progress["step"]
    bar = tqdm(total=args.max_train_steps, initial=step, desc="lora", disable=not accelerator.is_main_process)
    logged_step, logged_time = step, time.perf_counter()
    for micro_step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            x0 = normalize(batch["pixel_values"])
            accumulated = micro_step % args.gradient_accumulation_steps
            place = (accumulated * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            noise, sigma, dropped = draw_noise(
                (args.seed, 0, step), place, images_per_step, x0.shape, shift, *levels, device, args.caption_dropout
            )
            captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"])]
            with accelerator.autocast():
                conditions = encode_captions(pipeline, pipeline.text_encoder, captions, device)
                losses = flow_loss(model, x0, noise, sigma, band_factor, weighting, **conditions)
            accelerator.backward(losses.loss)
            if accelerator.sync_gradients:
                limit, folder = args.max_grad_norm, output_dir / "checkpoints"
                take_step(accelerator, optimizer, parameters, limit, guard, "lora", step, losses.sigma, folder)
                lr_scheduler.step()
            optimizer.zero_grad()
        meter.update(torch.stack([losses.low, losses.high, losses.sigma], dim=1))
        if not accelerator.sync_gradients:
            continue

        step += 1
        ema.step(parameters)
        bar.update()
        last = step == args.max_train_steps
        # Seldom, or where it waits for the GPU anyway.
        ask = last or any(step % steps == 0 for steps in (10, args.logging_steps, args.checkpointing_steps))
        interrupted = interrupt.noted(accelerator, ask)
        if step % args.logging_steps == 0 or last or interrupted:
            now = time.perf_counter()
            rate = (step - logged_step) * images_per_step / (now - logged_time)
            logged_step, logged_time = step, now
            means = {**meter.compute(accelerator), **guard.compute()}
            values = {"images_per_second": rate, "lr": lr_scheduler.get_last_lr()[0], **means}
            if accelerator.is_main_process:
                with open(metrics_path, "a") as file:
                    file.write(json.dumps({"phase": "lora", "step": step, **values}) + "\n")
            accelerator.log(values, step=step)
            bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", images_per_s=f"{rate:.1f}")
        if interrupted:
            logger.info(save_interrupted(save, "lora", step, guard, output_dir / "checkpoints"))
            accelerator.end_training()
            sys.exit(128 + (interrupt.signal or signal.SIGTERM))
        # Not while steps are left out: what made them bad may be in the weights.
        if (step % args.checkpointing_steps == 0 and not guard.skipped_in_a_row) or last:
            save(step)
        if step % args.validation_steps == 0 and not last and accelerator.is_main_process:
            paused = time.perf_counter()
            draw_grid()
            logged_time += time.perf_counter() - paused
    bar.close()

    # 8. The averaged weights are what the run has made
    if accelerator.is_main_process:
        draw_grid()
        draw_losses(metrics_path, output_dir / "loss.png")
        ema.copy_to(parameters)
        save_adapter(unet, output_dir)
        make_lora_card(
            repo_id,
            args.pretrained_model_name_or_path,
            args.revision,
            prompt=prompts[0],
            samples=SAMPLES,
            trained=f"rank {args.rank}, {step} steps, {total} images seen, seed {args.seed}",
            license=args.hub_license,
            datasets=[args.dataset_name] if args.dataset_name else None,
        ).save(output_dir / "README.md")
        logger.info(f"Done: {output_dir / WEIGHTS}, images in {output_dir / SAMPLES}.")
        if args.push_to_hub:
            publish(output_dir, repo_id)
    accelerator.end_training()


if __name__ == "__main__":
    main()

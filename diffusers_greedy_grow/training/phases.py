# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The phases of a run (Vasconcelos et al., 2024, section 4): what each trains, at which resolution, and how."""

from dataclasses import dataclass

from ..hub.lineage import add_to_lineage
from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel
from .arguments import LoraArguments, ModelArguments, TrainingArguments


@dataclass(frozen=True)
class Phase:
    """
    One phase, with its own value of each argument that has one per resolution or per stage.

    Args:
        index (`int`): The phase's place among all phases that a run may have; random numbers depend on it.
        name (`str`): The name of the pipeline folder that the phase ends in.
        kind (`str`): `"core"`, `"detail"` (only the newest stage trains), `"joint"` (everything trains) or `"lora"`.
        stage (`int`): How many growth stages the model has; 0 for a core.
        resolution (`int`): The side of the images, in pixels.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Images per process and batch.
        learning_rate (`float`): Peak learning rate.
        logit_mean (`float`), logit_std (`float`): The distribution of noise levels, see [`~flow.sample_sigma`].
        loss_weighting (`str`): See [`~training.objective.flow_loss`].
    """

    index: int
    name: str
    kind: str
    stage: int
    resolution: int
    steps: int
    batch_size: int
    learning_rate: float
    logit_mean: float
    logit_std: float
    loss_weighting: str

    def is_same(self, index: int, name: str) -> bool:
        """
        Return whether a checkpoint of phase `index` and `name` is of this phase. A detail phase has another name if a joint phase was
        added behind it, or removed.
        """
        return self.index == index and self.name.removesuffix("-detail") == name.removesuffix("-detail")

    def freeze(self, unet: ShallowUNet2DModel | GrowableUNet2DConditionModel) -> None:
        """Freeze what this phase does not train."""
        if self.kind == "detail":
            unet.freeze_core()
        elif self.kind == "joint":
            unet.unfreeze_core()

    def record(
        self,
        unet: ShallowUNet2DModel | GrowableUNet2DConditionModel,
        steps: int,
        images_per_step: int,
        seed: int,
        **kept: float,
    ) -> None:
        """Add what `steps` of this phase did to the lineage of `unet`, and which weights were `kept`, if not the last."""
        add_to_lineage(
            unet,
            phase=self.name,
            resolution=self.resolution,
            trained="the new stage" if self.kind == "detail" else "everything",
            steps=steps,
            images=steps * images_per_step,
            seed=seed,
            **kept,
        )


def list_phases(model_args: ModelArguments, args: TrainingArguments) -> list[Phase]:
    """List the phases of a run in order. A phase of no steps is left out. `joint_steps` must be known, see [`adopt_core`]."""
    assert args.joint_steps is not None
    phases = []

    def add(index: int, name: str, kind: str, stage: int, steps: int) -> None:
        if steps:
            phases.append(
                Phase(
                    index=index,
                    name=name,
                    kind=kind,
                    stage=stage,
                    resolution=model_args.resolutions[stage],
                    steps=steps,
                    batch_size=args.train_batch_size[stage],
                    learning_rate=args.learning_rate[stage],
                    logit_mean=args.logit_mean[stage],
                    logit_std=args.logit_std[stage],
                    loss_weighting=args.loss_weighting[stage],
                )
            )

    if model_args.core is None:
        add(0, "core", "core", 0, args.core_steps)
    for stage, resolution in enumerate(model_args.resolutions[1:], start=1):
        detail_steps, joint_steps = args.detail_steps[stage - 1], args.joint_steps[stage - 1]
        name = f"grown-{resolution}"
        add(2 * stage - 1, f"{name}-detail" if joint_steps else name, "detail", stage, detail_steps)
        add(2 * stage, name, "joint", stage, joint_steps)
    return phases


def make_lora_phase(args: LoraArguments, unet: ShallowUNet2DModel | GrowableUNet2DConditionModel) -> Phase:
    """
    Return the run's only phase. Noise levels and weighting that are not given are the defaults of grow.py, for a core or for a
    grown model.
    """
    stage = len(unet.sample_sizes) - 1

    def resolve(name: str):
        given = getattr(args, name)
        return getattr(TrainingArguments(), name)[min(stage, 1)] if given is None else given

    return Phase(
        index=0,
        name="lora",
        kind="lora",
        stage=stage,
        resolution=unet.config.sample_size,
        steps=args.max_train_steps,
        batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
        logit_mean=resolve("logit_mean"),
        logit_std=resolve("logit_std"),
        loss_weighting=resolve("loss_weighting"),
    )

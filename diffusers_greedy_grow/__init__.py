# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Greedy growing for diffusers: high-resolution text-to-image models in pixel space."""

import logging as _logging


# transformers and diffusers warn while they are imported of packages that this one does not need.
_disabled = _logging.root.manager.disable
_logging.disable(max(_disabled, _logging.WARNING))
try:
    # Exported for diffusers, which looks up `ModelMixin` in the package that `model_index.json` names.
    from diffusers import ModelMixin

    from .models import GrowableUNet2DConditionModel, ShallowUNet2DModel
    from .pipelines import (
        GreedyGrowBlocks,
        GreedyGrowImg2ImgPipeline,
        GreedyGrowInpaintPipeline,
        GreedyGrowModularPipeline,
        GreedyGrowPipeline,
        GreedyGrowUpscalePipeline,
    )
    from .registration import register
    from .version import __version__
finally:
    _logging.disable(_disabled)


__all__ = [
    "GreedyGrowBlocks",
    "GreedyGrowImg2ImgPipeline",
    "GreedyGrowInpaintPipeline",
    "GreedyGrowModularPipeline",
    "GreedyGrowPipeline",
    "GreedyGrowUpscalePipeline",
    "GrowableUNet2DConditionModel",
    "ModelMixin",
    "ShallowUNet2DModel",
]

register(
    __name__,
    models=(ShallowUNet2DModel, GrowableUNet2DConditionModel),
    pipelines={
        "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": GreedyGrowPipeline,
        "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": GreedyGrowImg2ImgPipeline,
        "AUTO_INPAINT_PIPELINES_MAPPING": GreedyGrowInpaintPipeline,
        None: GreedyGrowUpscalePipeline,  # diffusers has no auto pipeline for upscaling
    },
    modular=(GreedyGrowModularPipeline, GreedyGrowBlocks),
    pipeline_name="greedy-grow",
)

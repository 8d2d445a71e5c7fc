# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The output of the pipelines."""

from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.pipeline_utils import ImagePipelineOutput


@dataclass
class GreedyGrowPipelineOutput(ImagePipelineOutput):
    """
    Images, and those of the levels inside that drew them.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images.
        level_images (`dict[int, Any]`, *optional*):
            The images of each level by its resolution, such as `{16: [...], 64: [...]}`, the last of which are `images`. The
            others are the clean images that the levels inside predicted in the last step.
    """

    level_images: dict[int, Any] | None = None

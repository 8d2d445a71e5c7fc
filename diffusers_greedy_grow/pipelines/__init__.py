# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

from .modular import GreedyGrowBlocks, GreedyGrowModularPipeline
from .pipeline_greedy_grow import GreedyGrowPipeline
from .pipeline_greedy_grow_img2img import GreedyGrowImg2ImgPipeline
from .pipeline_greedy_grow_inpaint import GreedyGrowInpaintPipeline
from .pipeline_greedy_grow_upscale import GreedyGrowUpscalePipeline

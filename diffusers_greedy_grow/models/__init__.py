# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

from .growable_unet_2d_condition import GrowableUNet2DConditionModel
from .shallow_unet_2d import ShallowUNet2DModel

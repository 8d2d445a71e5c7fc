# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Runs the script that the first argument names, with the others, and FSDP2 on CPUs. accelerate knows it on accelerators only and
silently falls back to DDP: here it takes CPUs that talk over gloo for accelerators. All else is as on a cluster.
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

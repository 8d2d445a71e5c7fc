# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Run the script that the first argument names, with the other arguments, with FSDP2 on CPUs. accelerate has FSDP2 on accelerators only
and silently falls back to DDP: here it takes CPUs that communicate over gloo for accelerators. All else is as on a cluster.
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

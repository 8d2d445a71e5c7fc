# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

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

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


"""What the benchmarks share: tables in Markdown, spreads, and a description of the machine."""

import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import diffusers
import torch


RESULTS = Path(__file__).parent / "results"
if torch.cuda.is_available():
    RESULTS /= "gpu"


def spread(values: list[float], digits: int = 3) -> str:
    """The median, and in brackets the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def mean_and_deviation(values: list[float], digits: int = 3) -> str:
    """The mean and, of more than one, the standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows: list[dict]) -> str:
    if not rows:
        return "Nothing has been run yet."
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def describe_machine() -> str:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        models = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.processor()
        device = f"{os.cpu_count()} cores of {name}"
    return f"{device}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def describe_commit() -> str | None:
    """That of the code, where it is a git checkout, and whether the code has been changed since."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    return f"{commit}{'-dirty' if changed else ''}" if commit else None


def write_json(path: Path, content: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)

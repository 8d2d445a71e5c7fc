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

"""Files of a run: each is complete or absent, because it is written aside and then renamed."""

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline to `folder`, which it replaces if it exists."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    phase: str,
    step: int,
    ema: EMAModel,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    total_limit: int,
    schedule: dict[str, int] | None = None,
) -> Path:
    """
    Saves all that a phase needs to go on after `step`: what accelerate has prepared, and the moving average by name;
    and `schedule`, the numbers that have to be the same when it does. Keeps the newest `total_limit` checkpoints in
    `folder`. Called on all processes.
    """
    checkpoint = folder / f"{phase}-{step}"
    temporary = folder / f".{checkpoint.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        pairs = zip(named_parameters, ema.shadow_params, strict=True)
        shadows = {name: shadow.contiguous() for (name, _), shadow in pairs}
        save_file(shadows, temporary / "ema.safetensors")
        progress = {"phase": phase, "step": step, "ema_optimization_step": ema.optimization_step}
        progress["schedule"] = schedule or {}
        (temporary / "progress.json").write_text(json.dumps(progress))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)
        temporary.rename(checkpoint)
        for old in sorted_checkpoints(folder)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return checkpoint


def sorted_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    complete = [
        path for path in folder.glob("*") if not path.name.startswith(".") and (path / "progress.json").exists()
    ]
    return sorted(complete, key=lambda path: path.stat().st_mtime)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path:
    """
    The checkpoint that `resume_from_checkpoint` means: `"latest"`, or a folder.

    Raises:
        `ValueError`: if there is none.
    """
    if resume_from_checkpoint == "latest":
        checkpoints = sorted_checkpoints(output_dir / "checkpoints")
        if not checkpoints:
            raise ValueError(
                f"`resume_from_checkpoint='latest'`: there is no checkpoint in {output_dir / 'checkpoints'}. Start the "
                "run without it, or name the `output_dir` that it was started with."
            )
        return checkpoints[-1]
    checkpoint = Path(resume_from_checkpoint)
    if not (checkpoint / "progress.json").exists():
        raise ValueError(f"`resume_from_checkpoint={resume_from_checkpoint!r}` is no checkpoint of this script.")
    return checkpoint


def read_progress(checkpoint: Path) -> dict:
    """The `phase`, the `step` after which a checkpoint was saved, its `schedule`, and `ema_optimization_step`."""
    return json.loads((checkpoint / "progress.json").read_text())


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    ema_decay: float,
) -> EMAModel:
    """
    Restores what [`save_checkpoint`] saved into what accelerate has prepared, and returns the moving average.

    Raises:
        `ValueError`: if the average is of other parameters than `named_parameters`.
    """
    accelerator.load_state(str(checkpoint))
    shadows = load_file(checkpoint / "ema.safetensors", device=str(accelerator.device))
    shapes = {name: parameter.shape for name, parameter in named_parameters}
    if {name: shadow.shape for name, shadow in shadows.items()} != shapes:
        raise ValueError(f"{checkpoint} has a moving average of other parameters than this phase trains.")
    ema = EMAModel([parameter for _, parameter in named_parameters], decay=ema_decay)
    ema.shadow_params = [shadows[name] for name in shapes]  # by name: diffusers goes by position
    ema.optimization_step = read_progress(checkpoint)["ema_optimization_step"]
    return ema

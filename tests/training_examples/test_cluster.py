# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Several processes: they train the same model as one, and resume from each other's checkpoints. Large runs are planned in one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import StateDictType

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.checkpoints import Progress

from ..data_utils import write_image_folder
from .launching import FOLDER, GROW, environment, grow_flags, launch, launch_script, read_metrics, run, weights


STEPS = {"core_steps": 8, "detail_steps": 5, "joint_steps": 6, "validation_steps": 3, "logging_steps": 1}
PHASES = ("core", "grown-16-detail", "grown-16")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict:
    data = write_image_folder(tmp_path_factory.mktemp("data") / "images", count=60)
    return {
        "train_data_dir": data,
        "checkpoints_total_limit": 9,
        "sample_steps": 3,
        **STEPS,
    }


@pytest.fixture(scope="module")
def one(arguments, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("one") / "output"
    run(output_dir, train_batch_size=8, **arguments)
    return output_dir


@pytest.fixture(scope="module", params=["DDP", "FSDP2"])
def two(request, arguments, tmp_path_factory) -> tuple[Path, bool]:
    output_dir, fsdp = tmp_path_factory.mktemp(request.param) / "output", request.param == "FSDP2"
    launch(output_dir, num_processes=2, fsdp=fsdp, train_batch_size=4, **arguments)
    return output_dir, fsdp


def assert_same_run(a: Path, b: Path):
    """Two runs with the same global batch see the same images with the same noise, so they are equal up to rounding."""
    metrics, others = read_metrics(a), read_metrics(b)
    assert len(metrics) == len(others) > 19
    for line, other in zip(metrics, others):
        assert (line["phase"], line["step"], line.get("images")) == (
            other["phase"], other["step"], other.get("images"),
        )  # fmt: skip
        for name in line:
            if "loss" in name:
                assert other[name] == pytest.approx(line[name], rel=1e-5), (line, other)
            if name == "lr":
                assert other[name] == pytest.approx(line[name], rel=1e-9)
    for phase in PHASES:
        for part in ("unet", "text_encoder"):
            own, other = weights(a / phase, part), weights(b / phase, part)
            assert own.keys() == other.keys()
            for name, value in own.items():
                # A step of the optimizer moves a weight by 0.003 even where its gradient is only rounding.
                torch.testing.assert_close(other[name], value, atol=1e-3, rtol=0, msg=f"{phase} {name}")


@pytest.mark.slow
def test_two_processes_follow_one(one, two):
    output_dir, fsdp = two
    assert_same_run(one, output_dir)
    pipeline = GreedyGrowPipeline.from_pretrained(output_dir / "grown-16")
    assert pipeline.unet.sample_sizes == (8, 16) and type(pipeline.unet).__name__ == "GrowableUNet2DConditionModel"
    assert pipeline("image number 3", num_inference_steps=2).images[0].size == (16, 16)
    assert (output_dir / "samples" / "grown-16.png").exists()
    # A resumed run must match these.
    config = Progress.read(output_dir / "checkpoints" / "core-4").config
    assert config["images per step"] == dict.fromkeys(PHASES, 8) and config["FSDP"] == fsdp
    if fsdp:
        checkpoint = output_dir / "checkpoints" / "grown-16-detail-4"
        # Each process has written its part of every tensor. Frozen tensors have neither moments nor an average.
        model = FileSystemReader(checkpoint / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
        assert len(model["model.unet.core.transformer_blocks.0.attn1.to_q.weight"].chunks) == 2
        optimizer = FileSystemReader(checkpoint / "optimizer_0").read_metadata().state_dict_metadata
        moments = [name for name in optimizer if name.endswith("exp_avg")]
        assert moments and all("unet.stages.0." in name for name in moments)


@pytest.mark.slow
def test_a_run_is_resumed_with_another_number_of_processes(one, two, arguments, tmp_path):
    """Resume with one process in the first phase, then with two in the last, with accumulated batches."""
    output_dir, fsdp = two
    shutil.copytree(output_dir, tmp_path / "output")
    checkpoints = tmp_path / "output" / "checkpoints"
    shutil.rmtree(tmp_path / "output" / "grown-16")
    launch(
        tmp_path / "output",
        fsdp=fsdp,
        train_batch_size=8,
        resume_from_checkpoint=checkpoints / "core-4",
        **arguments,
    )
    assert_same_run(one, tmp_path / "output")
    launch(
        tmp_path / "output",
        num_processes=2,
        fsdp=fsdp,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        resume_from_checkpoint=checkpoints / "grown-16-4",
        **arguments,
    )
    assert_same_run(one, tmp_path / "output")


@pytest.mark.slow
@pytest.mark.parametrize("compiled,fsdp", [("model", False), ("blocks", True)], ids=["DDP", "FSDP2"])
def test_two_processes_compile(compiled, fsdp, one, arguments, tmp_path):
    """Gradient checkpointing computes again within the graphs."""
    own = {"compile": compiled, "gradient_checkpointing": True, "train_batch_size": 4}
    flags = grow_flags(tmp_path / "output", **own, **arguments)
    options = ["--dynamo_backend", "aot_eager"]
    done = launch_script(GROW, flags, num_processes=2, fsdp=fsdp, options=options, TORCH_LOGS="dynamo")
    assert done.returncode == 0 and "start tracing forward" in done.stdout, done.stdout[-9000:]
    assert_same_run(one, tmp_path / "output")


def test_a_sharded_model_is_not_compiled_as_a_whole(tmp_path):
    done = launch_script(GROW, grow_flags(tmp_path / "output", compile="model", plan=True), fsdp=True)
    assert done.returncode == 1 and "use `--compile blocks`" in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
def test_frozen_parameters_under_fsdp():
    """They are sharded apart and have no gradients. Layers compute in bfloat16; weights, gradients and images are float32."""
    done = launch_script(FOLDER / "sharded_step.py", [], fsdp=True, PYTHONPATH=str(GROW.parents[1]))
    assert done.returncode == 0 and "as it should be" in done.stdout, done.stdout[-5000:]


@pytest.mark.slow
def test_muon_under_fsdp(tmp_path):
    """Sharded matrices take the steps of whole ones, and so they do after a checkpoint was loaded."""
    script, path = FOLDER / "sharded_muon.py", str(GROW.parents[1])
    done = launch_script(script, [str(tmp_path / "state")], num_processes=2, fsdp=True, PYTHONPATH=path)
    assert done.returncode == 0 and done.stdout.count("as it should be") == 2, done.stdout[-5000:]


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2", "multi_node"])
def test_configurations_of_accelerate(name, monkeypatch):
    """`accelerate launch` accepts each: the number of processes and, with FSDP, the plugin."""
    path = GROW.parent / "accelerate" / f"{name}.yaml"
    command = re.search(r"#   (accelerate launch (?:.*\\\n)*.*)", path.read_text())[1].replace("\\\n#", "")
    command = command.replace("$MACHINE_RANK", "3").replace("$FIRST_MACHINE", "10.0.0.1")
    args = launch_command_parser().parse_args(command.replace("training_examples", str(GROW.parent)).split()[2:])
    args, _, _ = _validate_launch_command(args)
    assert args.training_script == str(GROW) and args.mixed_precision == "bf16"
    machines, processes = (8, 64) if name == "multi_node" else (1, 1 if name == "one_gpu" else 8)
    assert (args.num_machines, args.num_processes) == (machines, processes)
    assert bool(args.multi_gpu) == (name == "ddp") and bool(args.use_fsdp) == (name in ("fsdp2", "multi_node"))
    if name == "multi_node":
        assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (3, "10.0.0.1", 29500)
        assert args.training_script_args[0] == "--config"
    if args.use_fsdp:
        for key, value in prepare_multi_gpu_env(args).items():
            monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
        assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT


@pytest.mark.slow
def test_the_plan_of_eight_billion_parameters():
    """It is made without weights or a network."""
    config = GROW.parent / "configs" / "vermeer_8b.yaml"
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
from tests.testing_utils import peak_memory
print("Peak:", peak_memory())
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(GROW), "--plan", "--config", str(config)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log, _, peak = result.stdout.partition("Peak: ")
    assert result.returncode == 0, log
    assert int(peak.split()[0]) < 2e9
    parts = re.search(r"Parameters: core 64 px ([\d.]+) M, stage 256 px ([\d.]+) M, stage 1024 px ([\d.]+) M", log)
    assert sum(map(float, parts.groups())) * 1e6 == pytest.approx(8e9, rel=0.05)
    rows = {line.split()[0]: line.split()[1:] for line in log.split("GB per GPU")[1].splitlines()[2:]}
    assert list(rows) == ["core", "grown-256-detail", "grown-256", "grown-1024-detail", "grown-1024"]
    whole, checkpointed, sharded, both = map(float, rows["grown-1024"][1:])
    # Weights, gradients, two moments and the average take four bytes each per parameter.
    assert checkpointed > 5 * 4 * 8e9 / 2**30 > 64 * 2 and whole > checkpointed > sharded > both
    assert float(rows["grown-1024-detail"][1]) < whole / 2
    assert "PFLOP" in log and "Warning" not in log

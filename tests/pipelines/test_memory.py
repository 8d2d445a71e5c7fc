# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Less memory: offloading, layerwise casting and device maps, as in tests/models/test_memory.py."""

from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_greedy_grow import GreedyGrowPipeline

from ..testing_utils import draw_one, make_core, make_grown, make_pipeline


CPU = torch.device("cpu")


def test_model_cpu_offload_forward_pass(made):
    expected = draw_one(made)
    made.enable_model_cpu_offload(device="cpu")
    assert hasattr(made.unet, "_hf_hook") and hasattr(made.text_encoder, "_hf_hook")
    for _ in range(2):  # the second time after the hooks have moved everything back
        assert torch.equal(draw_one(made), expected)


def test_offloading_keeps_what_is_computed_once(made, monkeypatch):
    """The text is projected once for all steps: hooks that copy arguments must not copy the cache."""
    calls = []
    block = getattr(made.unet, "core", made.unet).transformer_blocks[0].attn2.to_k
    block.register_forward_hook(lambda *args: calls.append(1))
    made.enable_model_cpu_offload(device="cpu")
    draw_one(made)
    assert len(calls) == 1
    made.remove_all_hooks()
    made.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    draw_one(made)
    assert len(calls) == 2


def test_pipeline_with_accelerator_device_map(made, tmp_path):
    made.save_pretrained(tmp_path)
    for device_map in ("cpu", "balanced"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(draw_one(loaded), draw_one(made))


def test_layerwise_casting_inference(made):
    expected = draw_one(made, guidance_scale=1.0)  # guidance would enlarge rounding differences
    made.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (draw_one(made, guidance_scale=1.0) - expected).abs().mean() < 0.05


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_inference(made, offload_type):
    expected = draw_one(made)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    made.unet.enable_group_offload(CPU, offload_type=offload_type, **blocks)
    apply_group_offloading(made.text_encoder, onload_device=CPU, offload_type=offload_type, **blocks)
    for _ in range(2):
        assert torch.equal(draw_one(made), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_pipeline_level_group_offloading_inference(made, offload_type, tmp_path):
    """With offloading to the disk. By leaves, diffusers loses T5's tied embeddings there, so the text encoder is left out."""
    expected = draw_one(made)
    excluded = ["text_encoder"] if offload_type == "leaf_level" else None
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    made.enable_group_offload(
        CPU, offload_type=offload_type, offload_to_disk_path=str(tmp_path), exclude_modules=excluded, **blocks
    )
    assert list(tmp_path.rglob("*.safetensors"))
    for _ in range(2):
        assert torch.equal(draw_one(made), expected)


def test_pipeline_level_group_offloading_sanity_checks(made):
    made.enable_group_offload(CPU, offload_type="leaf_level", exclude_modules=["text_encoder"])
    assert _get_top_level_group_offload_hook(made.unet) is not None
    assert _get_top_level_group_offload_hook(made.text_encoder) is None


@pytest.mark.slow
def test_compile_repeated_blocks(made):
    expected = draw_one(made)
    torch.compiler.reset()
    made.unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")  # C++ would take long to compile
    torch.testing.assert_close(draw_one(made), expected, atol=1e-3, rtol=1e-3)


def test_compile_repeated_blocks_without_text():
    made = GreedyGrowPipeline(make_core(cross_attention_dim=None), FlowMatchEulerDiscreteScheduler())
    torch.compiler.reset()
    made.unet.compile_repeated_blocks(backend="aot_eager")
    assert made(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "made,ways",
    [
        (make_core, {}),
        (make_grown, {}),
        (make_grown, {"core_first": 0.6}),
        (make_grown, {"guidance_resolution": "core"}),
    ],
    ids=["core", "grown", "core_first", "guidance_resolution"],
    indirect=["made"],
)
def test_the_whole_model_compiles(made, ways):
    """As one graph per kind of step: with and without the text's keys and values, and with or without the stages."""

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return made(prompt, num_inference_steps=4, generator=generator, output_type="pt", **ways).images

    expected = draw("a small blue square")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    made.unet.compile(fullgraph=True, dynamic=False, backend=counter)
    assert torch.equal(draw("a small blue square"), expected)
    graphs = counter.frame_count
    assert 0 < graphs <= 4
    draw("a large red circle")
    assert counter.frame_count == graphs


class Graphs:
    """
    A backend that does with its results what CUDA graphs do: they are lost when the next step begins.

    Attributes:
        results (`list[torch.Tensor]`): Those of this step.
    """

    def __init__(self):
        self.results: list[torch.Tensor] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        def replay(*args):
            values = [value.clone() if isinstance(value, torch.Tensor) else value for value in module(*args)]
            self.results += [value for value in values if isinstance(value, torch.Tensor)]
            return values

        return replay

    def begin_step(self) -> None:
        for result in self.results:
            result.fill_(torch.nan)
        self.results.clear()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "model"])
@pytest.mark.parametrize(
    "made,ways",
    [
        (make_core, {}),
        (make_grown, {}),
        (make_grown, {"core_first": 0.6}),
        (make_grown, {"guidance_resolution": "core"}),
        (make_grown, {"output_levels": True}),
        (make_grown, {"guider": AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)}),
        (make_grown, {"scheduler": DPMSolverMultistepScheduler}),
        (make_grown, {"scheduler": UniPCMultistepScheduler}),
    ],
    ids=["core", "grown", "core_first", "guidance_resolution", "output_levels", "guider", "DPM++", "UniPC"],
    indirect=["made"],
)
def test_no_step_needs_what_graphs_have_returned_before(made, ways, whole, monkeypatch):
    """Guiders, solvers and the text's cache remember earlier steps, but not in the graphs' memory."""
    ways = dict(ways)
    if "scheduler" in ways:
        kwargs = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        made.scheduler = ways.pop("scheduler").from_config(made.scheduler.config, **kwargs)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 5, "generator": generator, "output_type": "pt", **ways}
        return made("a small blue square", **arguments).images

    expected = draw()
    torch.compiler.reset()
    graphs = Graphs()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graphs.begin_step)
    compile_it = made.unet.compile if whole else made.unet.compile_repeated_blocks
    compile_it(fullgraph=True, dynamic=False, backend=graphs)
    for _ in range(2):
        assert torch.equal(draw(), expected) and graphs.results


def test_what_callers_keep_is_not_in_the_graphs_memory(monkeypatch):
    """Previews that a callback keeps, and the images of the levels inside, which the next call would overwrite."""
    made = make_pipeline(make_grown(make_core(num_layers=1)))

    def draw() -> list[torch.Tensor]:
        kept = []

        def keep(pipeline, step, timestep, tensors):
            kept.append(tensors["pred_original_sample"])
            return {}

        output = made(
            "a small blue square", num_inference_steps=3, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
            output_type="latent", output_levels=True, callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
        )  # fmt: skip
        return [*kept, *output.level_images.values()]

    expected = draw()
    torch.compiler.reset()
    graphs = Graphs()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graphs.begin_step)
    made.unet.compile(fullgraph=True, dynamic=False, backend=graphs)
    first, second = draw(), draw()
    for images in (first, second):
        assert len(images) == 5 and all(map(torch.equal, images, expected))


def test_a_guider_at_the_core_is_not_compiled():
    """It counts the steps and remembers their predictions."""
    made = make_pipeline(make_grown(make_core(num_layers=1)))

    def draw() -> torch.Tensor:
        guider = AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)
        ways = {"guider": guider, "guidance_resolution": "core", "generator": torch.Generator().manual_seed(0)}
        return made("a small blue square", num_inference_steps=3, output_type="pt", **ways).images

    expected = draw()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    made.unet.compile(dynamic=False, backend=counter)
    assert torch.equal(draw(), expected)
    graphs = counter.frame_count
    assert torch.equal(draw(), expected) and counter.frame_count == graphs > 0
    made.unet.compile(fullgraph=True, dynamic=False, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model's blocks, or without `fullgraph`"):
        draw()


@pytest.mark.slow
def test_blocks_as_cuda_graphs(made):
    """
    Each step overwrites the graphs' memory, and with it the text's keys and values if they are left there. A CPU has no such
    graphs: there the blocks are compiled in the same mode.
    """
    made.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    prompts = ["a small blue square", "a large red circle"]
    latents = torch.randn(1, 3, *2 * [made.unet.config.sample_size], generator=torch.Generator().manual_seed(0))

    def draw(prompt: str) -> torch.Tensor:
        arguments = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "pt"}
        return made(prompt, latents=latents, **arguments).images

    expected = [draw(prompt) for prompt in prompts]
    torch.compiler.reset()
    made.unet.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    for _ in range(2):  # warmed up and recorded in the first, replayed in the second
        for prompt, images in zip(prompts, expected):
            torch.testing.assert_close(draw(prompt), images, atol=5e-3, rtol=0)


@pytest.mark.slow
def test_steps_are_marked_wherever_something_is_compiled(made, monkeypatch):
    """A part that `torch.compile` has wrapped counts, too: accelerate's `compile_regions` wraps each block."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    expected = draw_one(made)
    assert not marks
    blocks = getattr(made.unet, "core", made.unet).transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    assert torch.equal(draw_one(made), expected)
    assert len(marks) == made.num_timesteps


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_bar(made, quiet, capfd):
    made.set_progress_bar_config(disable=quiet)
    made("a small blue square", num_inference_steps=2)
    assert ("2/2" in capfd.readouterr().err) != quiet

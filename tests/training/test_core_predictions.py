# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""A frozen core's predictions, cached on disk: with real small models and images."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.flow import sample_sigma
from diffusers_greedy_grow.training.arguments import DataArguments, ModelArguments, TrainingArguments
from diffusers_greedy_grow.training.core_predictions.computing import (
    CachedObjective,
    cache_core_predictions,
    name_core,
    predict,
)
from diffusers_greedy_grow.training.core_predictions.draws import read_visits
from diffusers_greedy_grow.training.core_predictions.planning import check_caching, count_cached_bytes
from diffusers_greedy_grow.training.core_predictions.store import CorePredictions, check_space
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.images import normalize
from diffusers_greedy_grow.training.data.loading import make_loader, take_fingerprint
from diffusers_greedy_grow.training.data.visits import Augmentation
from diffusers_greedy_grow.training.objective import FlowObjective, flow_loss
from diffusers_greedy_grow.training.phases import Phase
from diffusers_greedy_grow.training.run_folder import lock_file
from diffusers_greedy_grow.training.signals import Interrupt
from diffusers_greedy_grow.training.text.captions import CaptionEncoder

from ..data_utils import make_image, to_bytes
from ..models.test_foreign_cores import make_foreign
from ..testing_utils import make_core, make_grown, make_pipeline


PHASE = Phase(1, "grown-32", "detail", 1, 32, 5, 4, 1e-3, 0.0, 1.0, "clean")


def make_images(first: int = 0, buckets=None, augmentation: Augmentation | None = None) -> CaptionedImages:
    """Six images with two captions each; every third one is wide."""
    pictures = [make_image(first + i).resize((64, 32) if i % 3 == 0 else (32, 32)) for i in range(6)]
    rows = {
        "image": [{"bytes": to_bytes(picture), "path": None} for picture in pictures],
        "text": [[f"image number {i}", f"the image {i}"] for i in range(6)],
    }
    features = Features({"image": ImageFeature(decode=False), "text": List(Value("string"))})
    return CaptionedImages(Dataset.from_dict(rows, features=features), 32, buckets, augmentation=augmentation)


@pytest.fixture
def interrupt(monkeypatch) -> Interrupt:
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C is for pytest
    return Interrupt()


@pytest.fixture
def pipeline() -> GreedyGrowPipeline:
    return prepare(make_pipeline(make_grown(make_core(), 32), shift=2.0))


def prepare(pipeline: GreedyGrowPipeline) -> GreedyGrowPipeline:
    pipeline.unet.train()
    pipeline.unet.freeze_core()
    pipeline.text_encoder.requires_grad_(False)
    return pipeline


def make_objective(
    pipeline: GreedyGrowPipeline, num_draws: int = 2, seed: int = 7, phase: Phase = PHASE
) -> CachedObjective:
    accelerator = Accelerator(cpu=True)
    encode = CaptionEncoder(pipeline, accelerator.device)
    return CachedObjective(phase, accelerator, encode, pipeline.unet, 2.0, seed, 0.5, num_draws=num_draws)


def cache(pipeline, images, folder: Path, interrupt: Interrupt, **kwargs) -> tuple[CachedObjective, CorePredictions]:
    objective = make_objective(pipeline, **kwargs)
    fingerprint = take_fingerprint(images)
    return objective, cache_core_predictions(pipeline, images, objective, 4, folder, fingerprint, 0, interrupt)


def load(predictions: CorePredictions, num_steps: int, seed: int = 7) -> list[dict]:
    loader = make_loader(predictions, Accelerator(cpu=True), 4, 0, num_steps, (seed, 1), 1, 0)
    return list(loader)


def count_calls(module: torch.nn.Module) -> list[int]:
    """The list of the batch sizes that a module has been called with so far."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("kind", ["plain", "cropped, mirrored and of two shapes", "two stages", "if", "prx"])
def test_the_loss_is_that_without_the_cache(kind, pipeline, interrupt, tmp_path):
    """Up to the rounding of what is cached; and the core does not run in training steps."""
    images = make_images()
    if kind.startswith("cropped"):
        images = make_images(buckets=[(32, 32), (16, 64)], augmentation=Augmentation(True, 0.5))
        pipeline = prepare(make_pipeline(make_grown(make_core(crop_conditioning=True), 32)))
    elif kind == "two stages":
        inner = make_grown(make_core(8, patch_size=2), 16, block_out_channels=(16,))
        pipeline = prepare(make_pipeline(make_grown(inner, 32, block_out_channels=(16,))))
    elif kind in ("if", "prx"):
        core, process = make_foreign(kind)
        size = {"core_sample_size": 16} if kind == "prx" else {}
        grown = make_grown(core, 32, block_out_channels=(8,), process=process, **size)
        pipeline = prepare(make_pipeline(grown))
    calls = count_calls(pipeline.unet.core)
    objective, predictions = cache(pipeline, images, tmp_path, interrupt)
    assert sum(calls) == 2 * 6
    calls.clear()
    batches = load(predictions, num_steps=6)
    assert {tuple(batch["pixel_values"].shape[2:]) for batch in batches} == (
        {(32, 32), (16, 64)} if kind.startswith("cropped") else {(32, 32)}
    )
    dropped_captions = set()
    for step, batch in enumerate(batches):
        actual = objective(pipeline.unet, batch, step, step)
        assert calls == []
        x0 = normalize(batch["pixel_values"])
        noise, sigma, dropped = objective.draw(batch, x0.shape, step, 0)
        conditions = FlowObjective.condition(objective, batch, dropped)
        expected = flow_loss(pipeline.unet, x0, noise, sigma, 2, "clean", **conditions)
        assert sum(calls) == 4
        calls.clear()
        torch.testing.assert_close(actual.loss, expected.loss, rtol=0.01, atol=0)
        torch.testing.assert_close(actual.stack(), expected.stack(), rtol=0.05, atol=0)
        # Without the rounding, nothing differs.
        exact = predict(pipeline.unet, objective, batch)
        calls.clear()
        again = flow_loss(pipeline.unet, x0, noise, sigma, 2, "clean", **conditions, core_output=exact)
        torch.testing.assert_close(again.stack(), expected.stack(), rtol=1e-5, atol=0)
        assert calls == []
        dropped_captions |= {*dropped}
    assert dropped_captions == {True, False}


def test_the_draws(pipeline, interrupt, tmp_path):
    """Each epoch shows another draw of each image. Draws have their own noise, levels and captions, of the usual distribution."""
    objective, predictions = cache(pipeline, make_images(), tmp_path, interrupt)
    visits = [pair for batch in load(predictions, 6) for pair in read_visits(batch)]
    assert len(visits) == 24  # four epochs
    assert all(sorted(visits[i : i + 6]) == [(index, i // 6 % 2) for index in range(6)] for i in range(0, 24, 6))
    captions = {predictions.rows[index, number]["caption"] for index in range(6) for number in range(2)}
    assert 6 < len(captions) <= 12
    many = replace(objective.draws, count=400)
    noise, sigma, dropped = many([3] * 400, [*range(400)], torch.Size([400, 3, 2, 2]), torch.device("cpu"))
    again = many([3], [17], torch.Size([1, 3, 2, 2]), torch.device("cpu"))
    assert torch.equal(again[0][0], noise[17]) and again[1][0] == sigma[17] and again[2][0] == dropped[17]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    expected = sample_sigma(4000, 2.0, 0.0, 1.0, torch.Generator().manual_seed(0))
    assert abs(sigma.mean() - expected.mean()) < 0.03 and abs(sigma.std() - expected.std()) < 0.03
    assert 0.4 < np.mean(dropped) < 0.6


@pytest.mark.parametrize("buckets", [None, [(32, 32), (16, 64)]])
def test_draws_that_no_step_reads_are_not_computed(buckets, pipeline, interrupt, tmp_path):
    calls = count_calls(pipeline.unet.core)
    phase = replace(PHASE, steps=2)  # eight visits of six images
    _, predictions = cache(pipeline, make_images(buckets=buckets), tmp_path, interrupt, num_draws=20, phase=phase)
    batches = load(predictions, num_steps=2)
    visits = {pair for batch in batches for pair in read_visits(batch)}
    assert sum(calls) == len(visits) == 8 and {number for _, number in visits} == {0, 1}
    # A longer phase reads more.
    _, predictions = cache(pipeline, make_images(buckets=buckets), tmp_path, interrupt, num_draws=20)
    assert len(load(predictions, num_steps=5)) == 5


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def test_an_interrupted_cache_continues(pipeline, interrupt, tmp_path):
    calls = count_calls(pipeline.unet.core)
    interrupt.signal = signal.SIGTERM
    with pytest.raises(SystemExit):
        cache(pipeline, make_images(), tmp_path, interrupt)
    assert sum(calls) == 4 and not [*tmp_path.rglob("predictions.bin")] and not [*tmp_path.rglob(".lock")]
    interrupt.signal = None
    _, predictions = cache(pipeline, make_images(), tmp_path, interrupt)
    assert sum(calls) == 12 and [path.name for path in tmp_path.iterdir()] == [predictions.folder.name]
    assert {path.name for path in predictions.folder.iterdir()} == {"about.json", "predictions.bin"}
    _, at_once = cache(pipeline, make_images(), tmp_path / "other", interrupt)
    assert at_once.path.read_bytes() == predictions.path.read_bytes()
    assert predictions.path.stat().st_size == predictions.layout.total_bytes
    calls.clear()
    cache(pipeline, make_images(), tmp_path, interrupt)
    assert calls == []


def test_a_full_disk(pipeline, interrupt, tmp_path):
    """The error names the folder and the size. What was written before is used, and the prediction that was cut off is not."""

    def cache_within(limit: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(
                OSError, match="File too large: the core's predictions, 0.000 GB in all, .* `core_pred"
            ):
                cache(pipeline, make_images(), tmp_path, interrupt)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    calls = count_calls(pipeline.unet.core)
    _, at_once = cache(pipeline, make_images(), tmp_path / "other", interrupt)
    size = at_once.layout.total_bytes
    calls.clear()
    cache_within(size - 1)  # before any is computed
    assert calls == []
    interrupt.signal = signal.SIGTERM
    with pytest.raises(SystemExit):
        cache(pipeline, make_images(), tmp_path, interrupt)
    interrupt.signal = None
    cache_within(at_once.layout.start(3, 0) + 100)  # in the first prediction of the fourth of six images
    calls.clear()
    _, predictions = cache(pipeline, make_images(), tmp_path, interrupt)
    assert sum(calls) == 6 and predictions.path.read_bytes() == at_once.path.read_bytes()


@pytest.mark.parametrize("has_finished", [False, True])
def test_two_runs_at_once(has_finished, pipeline, interrupt, tmp_path, monkeypatch):
    """The second one is refused, or uses what the first one has finished at that moment."""
    _, at_once = cache(pipeline, make_images(), tmp_path / "first", interrupt)
    folder = tmp_path / "second" / at_once.folder.name
    folder.mkdir(parents=True)
    if has_finished:

        def hold(*args):  # the first run releases the lock as soon as its file is there
            at_once.path.replace(folder / "predictions.bin")
            return lock_file(*args)

        monkeypatch.setattr("diffusers_greedy_grow.training.core_predictions.computing.lock_file", hold)
        calls = count_calls(pipeline.unet.core)
        _, predictions = cache(pipeline, make_images(), tmp_path / "second", interrupt)
        assert calls == [] and len(load(predictions, 6)) == 6
        return
    held = "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); sys.stdin.read()"
    command = [sys.executable, "-c", held, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=f"{folder} is in use by another process. Wait for that run or stop it"):
            cache(pipeline, make_images(), tmp_path / "second", interrupt)
        process.communicate()
    cache(pipeline, make_images(), tmp_path / "second", interrupt)


def test_what_decides_the_predictions_is_noticed(pipeline, interrupt, tmp_path):
    _, first = cache(pipeline, make_images(), tmp_path, interrupt)
    assert json.loads((first.folder / "about.json").read_text())["draws"]["seed"] == 7
    folders = {first.folder}

    def assert_new(pipeline=pipeline, images=None, **kwargs) -> None:
        _, predictions = cache(pipeline, images or make_images(), tmp_path, interrupt, **kwargs)
        assert predictions.folder not in folders
        folders.add(predictions.folder)

    assert_new(seed=8)
    assert_new(num_draws=1)
    assert_new(phase=replace(PHASE, logit_mean=0.5))
    assert_new(images=make_images(augmentation=Augmentation(horizontal_flip=True)))
    assert_new(images=make_images(buckets=[(32, 32), (16, 64)]))
    assert_new(images=make_images().select(np.arange(5)))
    next(pipeline.text_encoder.parameters()).data.add_(1)
    assert_new()
    next(pipeline.unet.core.parameters()).data.add_(1)
    assert_new()
    # The stage's weights decide nothing.
    next(pipeline.unet.stages[-1].parameters()).data.add_(1)
    assert cache(pipeline, make_images(), tmp_path, interrupt)[1].folder in folders
    # Other images with the same captions
    predictions = CorePredictions(tmp_path, first.key, make_images(first=50), first.draws, first.layout)
    with pytest.raises(ValueError, match="has predictions for another image number 0: the images have changed"):
        predictions[0, (7, 1, 0)]


def test_the_disk_space_that_a_run_has_taken_already(pipeline, interrupt, tmp_path):
    """Not that of other runs in the same folder: another core's, another seed's."""

    def count(seed: int = 7, core: str | None = None) -> int:
        core = core or name_core(pipeline.unet)
        return count_cached_bytes(tmp_path, core, take_fingerprint(make_images()), 6, 32, seed, 2)

    assert count() == 0
    _, first = cache(pipeline, make_images(), tmp_path, interrupt)
    own = first.path.stat().st_blocks * 512
    assert count() == own >= first.layout.total_bytes and count(seed=8) == 0
    before = name_core(pipeline.unet)
    assert name_core(pipeline.unet.core) == before  # alone, as before it is grown
    next(pipeline.unet.core.parameters()).data.add_(1)
    assert count() == 0 and count(core=before) == own
    cache(pipeline, make_images(), tmp_path, interrupt)
    assert count() == own


def test_predictions_that_are_cut_off(pipeline, interrupt, tmp_path):
    _, predictions = cache(pipeline, make_images(), tmp_path, interrupt)
    size = predictions.layout.total_bytes
    os.truncate(predictions.path, size // 2)
    with pytest.raises(OSError, match=f"has {size // 2} bytes instead of {size}: it is damaged. Remove .*, and"):
        cache(pipeline, make_images(), tmp_path, interrupt)


def test_a_core_that_predicts_no_numbers(pipeline, interrupt, tmp_path):
    next(pipeline.unet.core.parameters()).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="predictions are not finite for the images"):
        cache(pipeline, make_images(), tmp_path, interrupt)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_what_is_refused(tmp_path):
    accelerator = Accelerator(cpu=True)
    args = TrainingArguments(cache_core_predictions=2, joint_steps=[0])
    check_caching(args, DataArguments(), ModelArguments(), accelerator)
    for changes, data, model, message in (
        ({"joint_steps": [0, 5]}, {}, {}, r"`cache_core_predictions=2` .* `joint_steps=\[0, 5\]` trains it"),
        ({}, {"streaming": True}, {}, "`cache_core_predictions=2` .* `streaming` are not numbered"),
        ({}, {}, {"init": "random"}, '`cache_core_predictions=2` .* pass `init="preserve"`'),
    ):
        with pytest.raises(ValueError, match=message):
            check_caching(replace(args, **changes), DataArguments(**data), ModelArguments(**model), accelerator)
    check_space(tmp_path / "new", 1, 0)
    check_space(tmp_path / "new", 10**18, 10**18)
    with pytest.raises(
        OSError, match="need 1000000000.0 GB in .*new, .* but only [0-9.]+ GB are free: name another disk"
    ):
        check_space(tmp_path / "new", 10**18, 0)


def test_a_core_output_that_does_not_fit(pipeline):
    unet = pipeline.unet
    text = {"encoder_hidden_states": torch.randn(1, 4, 32)}
    state, time = torch.randn(1, 3, 32, 32), torch.tensor([500.0])
    image, features = unet.predict_core(state, time, **text)
    with pytest.raises(
        ValueError,
        match=r"`core_output` has the shapes \[\(1, 3, 8, 8\), .* have \[\(1, 3, 16, 16\), \(1, 32, 4, 4\)\]",
    ):
        unet(state, time, **text, core_output=(image[..., :8, :8], features))
    for output in ((image, features[:, :8]), (image, features[:0]), (image,), image):
        with pytest.raises(
            ValueError, match="`core_output` has the shapes .* pass what `predict_core` returns for it"
        ):
            unet(state, time, **text, core_output=output)
    # An image that takes the place of the core's does so here, too.
    given = torch.randn(1, 3, 16, 16)
    expected = unet(state, time, **text, inner_image=given).sample
    torch.testing.assert_close(
        unet(state, time, **text, inner_image=given, core_output=(image, features)).sample, expected
    )
    guided = {"negative_encoder_hidden_states": text["encoder_hidden_states"], "guide": lambda a, b: a}
    with pytest.raises(ValueError, match="`core_output` is a prediction for one text"):
        unet(state, time, **text, **guided, core_output=(image, features))
    random = make_grown(init="random")
    with pytest.raises(ValueError, match="`num_stages=0` needs a core that predicts images"):
        random.predict_core(state, time, **text)
    with pytest.raises(ValueError, match="`core_output` is a prediction for one text, of a core that draws images"):
        random(state, time, **text, core_output=(image, features))

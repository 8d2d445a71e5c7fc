# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
The scorer of stickers, trained for seconds on drawn shapes in two styles: what it learns, refuses and prints, and the training
comparisons on such data.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

from benchmarks import arms, few_high_res, grow_vs_scratch, plain, small_data, stickers_images, stickers_scorer
from benchmarks.evaluate import draw_images, load_held_out, score
from benchmarks.queue_of_runs import Setting, growth_job, run_inputs, run_queue
from benchmarks.stickers_scorer import (
    StickersScorer,
    augment,
    compute_features,
    draw_names,
    load_captioned,
    score_images,
    train,
)
from benchmarks.swd import sliced_wasserstein
from diffusers_greedy_grow.training.data.sources import load_splits
from diffusers_greedy_grow.training.parsing import parse_arguments
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer

from ..testing_utils import make_core, make_pipeline


COLORS, SHAPES, STYLES = ("red", "green", "blue", "orange"), ("circle", "box", "bar"), ("filled", "outlined")
CATEGORIES = {"circle": "Symbols", "box": "Objects", "bar": ""}
HELD_OUT = ("red box", "blue circle")


def draw(name: str, style: str, rng: np.random.Generator) -> Image.Image:
    """A shape on white, 64 px."""
    color, shape = name.split()
    image = Image.new("RGB", (64, 64), "white")
    x, y, size = rng.integers(24, 40), rng.integers(24, 40), rng.integers(14, 20)
    box = (x - size, y - size, x + size, y + size) if shape != "bar" else (x - size, y - 5, x + size, y + 5)
    painter = ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle
    painter(box, fill=color if style == "filled" else "white", outline=color, width=3)
    return image


def write_split(path: Path, names: list[str], per_style: int) -> None:
    rng = np.random.default_rng(len(names))
    rows = [(name, style) for name in names for style in STYLES for _ in range(per_style)]
    table = {
        "image": [draw(name, style, rng) for name, style in rows],
        "text": [f"{name}, {style}" for name, style in rows],
        "name": [name for name, _ in rows],
        "style": [style for _, style in rows],
        "category": [CATEGORIES[name.split()[1]] for name, _ in rows],
    }
    strings = dict.fromkeys(("text", "name", "style", "category"), Value("string"))
    Dataset.from_dict(table, features=Features({"image": ImageFeature(), **strings})).to_parquet(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shapes of all names but two, other images of the same names, and images of these two."""
    folder = tmp_path_factory.mktemp("shapes")
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in HELD_OUT]
    write_split(folder / "train.parquet", names, 8)
    write_split(folder / "validation.parquet", names, 2)
    write_split(folder / "test.parquet", list(HELD_OUT), 5)
    return folder


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> str:
    """The folder of a T5 encoder of no layers, with random word vectors."""
    folder = tmp_path_factory.mktemp("text_encoder")
    tokenizer = train_small_tokenizer([f"{color} {shape}" for color in COLORS for shape in SHAPES])
    torch.manual_seed(0)
    build_small_text_encoder(tokenizer, hidden_size=32, num_layers=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(data, text_encoder, tmp_path_factory) -> Path:
    """The folder of a trained scorer."""
    out = tmp_path_factory.mktemp("scorers") / "scorer"
    train(data, text_encoder, out, epochs=20, batch_size=16, widths=(8, 16, 32))
    return out


@pytest.fixture(scope="module")
def scorer(folder) -> StickersScorer:
    return StickersScorer.from_pretrained(folder, use_safetensors=True)


def test_it_is_right_about_held_out_images(scorer, data):
    assert scorer.config.styles == list(STYLES) and scorer.config.categories == ["Objects", "Symbols"]
    assert scorer.config.names["red bar"] == "" and scorer.config.names["red box"] == "Objects"
    accuracy = scorer.config.accuracy
    assert accuracy["validation"]["style"] > 0.95 and accuracy["test"]["style"] > 0.9
    assert accuracy["validation"]["category"] > 0.9
    assert accuracy["validation"]["retrieval"] > 0.8  # chance is 1 / 12
    # The saved scorer says the same as the one that was trained.
    for split in ("validation", "test"):
        assert score_images(scorer, *load_captioned(str(data), split)) == pytest.approx(accuracy[split], abs=1e-6)


def test_wrong_captions_score_low(scorer, data):
    images, captions = load_captioned(str(data), "validation")
    other = {"filled": "outlined", "outlined": "filled", "circle": "box", "box": "circle"}
    wrong = [" ".join(other.get(word, word) for word in caption.replace(",", " ,").split()) for caption in captions]
    wrong = [caption.replace(" ,", ",") for caption in wrong]
    scores, right = score_images(scorer, images, wrong), score_images(scorer, images, captions)
    assert scores["style"] == pytest.approx(1 - right["style"]) and scores["category"] < 0.2
    assert scores["retrieval"] < right["retrieval"] - 0.3  # bars are still bars


def test_larger_images_score_alike(scorer, data):
    images, captions = load_captioned(str(data), "validation")
    large = images.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert score_images(scorer, large, captions)["style"] == score_images(scorer, images, captions)["style"]


def test_the_kernel_distance(scorer, data):
    """It grows as images are less like the real ones."""
    images, captions = load_captioned(str(data), "train")
    real, _ = load_captioned(str(data), "validation")
    filled = [i for i, caption in enumerate(captions) if caption.endswith("filled")]
    sets = [images, images[filled], images[filled].flip(1)]  # in the last one, red is blue
    same, half, wrong = (score_images(scorer, batch, captions[: len(batch)], real)["kid"] for batch in sets)
    assert same < half / 4 and half < wrong
    assert "kid" not in score_images(scorer, real[:1], captions[:1])


def test_the_other_names_are_always_the_same():
    names = {f"name {i}": i for i in range(200)}
    drawn = draw_names(names, "name 7")
    assert drawn[0] == 7 and len(drawn) == len(set(drawn)) == 50
    assert drawn == draw_names(dict(reversed(names.items())), "name 7") != draw_names(names, "name 8")


def test_augmented_images_stay_on_paper_and_flip_if_they_may():
    torch.manual_seed(0)
    image = torch.ones(3, 64, 64)
    image[:, :, 12:28] = 0  # black, left of the middle
    images = augment(image.repeat(200, 1, 1, 1), torch.tensor([True, False]).repeat(100))
    assert images.min() >= 0 and images.max() <= 1 and images[:, :, :, [0, -1]].amin() >= 0.79
    on_the_right = images[..., 32:].mean((1, 2, 3)) < images[..., :32].mean((1, 2, 3))
    assert 25 < on_the_right[::2].sum() < 75 and not on_the_right[1::2].any()
    widths = (images.mean((1, 2)) < 0.5).sum(-1)
    assert widths.min() < 15 and widths.max() > 17


@pytest.mark.parametrize(
    "images,captions,message",
    [
        (torch.zeros(1, 3, 64, 64), ["red box"], "1 captions that the scorer does not know, such as ', red box'"),
        (torch.zeros(1, 3, 64, 64), ["red moon, filled"], "such as 'red moon, filled': a caption must be a name"),
        (torch.zeros(1, 3, 64, 64), ["red box, woolen"], r"a comma and one of \['filled', 'outlined'\]"),
        (torch.zeros(2, 3, 64, 64), ["red box, filled"], "must be as many; got 2 and 1"),
        (torch.zeros(1, 3, 32, 32), ["red box, filled"], r"shape \(1, 3, 32, 32\) must be \(B, 3, R, R\) with R of at least 64"),
        (torch.zeros(1, 3, 64, 80), ["red box, filled"], r"shape \(1, 3, 64, 80\) must be"),
        (torch.zeros(1, 64, 64, 3), ["red box, filled"], r"shape \(1, 64, 64, 3\) must be"),
        (-torch.ones(1, 3, 64, 64), ["red box, filled"], r"must be in \[0, 1\]; got -1 to -1"),
        (torch.full((1, 3, 64, 64), 255), ["red box, filled"], "got 255 to 255. Divide bytes by 255"),
    ],
)  # fmt: skip
def test_bad_images_and_captions(scorer, images, captions, message):
    with pytest.raises(ValueError, match=message):
        score_images(scorer, images, captions)


def test_bad_data(data, text_encoder, tmp_path):
    with pytest.raises(ValueError, match="has no train.parquet"):
        train(tmp_path, text_encoder, tmp_path / "out")
    with pytest.raises(ValueError, match="`batch_size=500` is larger than the 160 training images"):
        train(data, text_encoder, tmp_path / "out", batch_size=500)
    with pytest.raises(ValueError, match="has no split 'dev', only"):
        load_captioned(str(data), "dev")


def test_the_command_line(folder, data, tmp_path, capsys):
    """Samples in a folder are scored, after what the scorer is worth on real images."""
    images, captions = load_captioned(str(data), "test")
    for i, (image, caption) in enumerate(zip(images, captions)):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    stickers_scorer.main(["score", "--scorer", str(folder), "--images", str(tmp_path), "--real", str(data)])
    *real, last = capsys.readouterr().out.splitlines()
    assert sorted(line[:33] for line in real) == [
        "real images of test: style 1.000,",
        "real images of validation: style ",
    ]
    assert [word for word in last.split() if word.isalpha()] == ["style", "category", "retrieval", "kid"]


def test_features_do_not_depend_on_the_batch(scorer, data):
    images, _ = load_captioned(str(data), "train")
    features = compute_features(scorer, images)
    assert torch.allclose(features[7:9], compute_features(scorer, images[7:9]), atol=1e-4)


def test_held_out_stickers_are_drawn_scored_and_shown_beside_the_real_ones(folder, data, tmp_path, capsys):
    pipeline = make_pipeline(make_core(64, 8))
    pipeline.save_pretrained(tmp_path / "pipeline")
    flags = {"pipeline": tmp_path / "pipeline", "data": data, "scorer": folder, "out": tmp_path / "out"}
    flags |= {"count": 18, "num_inference_steps": 1}
    stickers_images.main([f"--{name}={value}" for name, value in flags.items()])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert {split: part["images"] for split, part in scores.items()} == {"validation": 18, "test": 18}
    for split, part in scores.items():
        captions, real = stickers_images.choose(data, split, 18, 64)
        assert len(set(captions)) > 3 and set(part["drawn"]) == {"style", "category", "retrieval", "kid"}
        expected = score_images(StickersScorer.from_pretrained(folder, use_safetensors=True), real, captions)
        assert part["real"] == pytest.approx(expected)
        # What is drawn is noise, and the real images are what they should be.
        assert part["drawn"]["kid"] > 100 and part["real"]["style"] > 0.9
    grid = Image.open(tmp_path / "out" / "stickers.png")
    assert grid.width > 8 * 128 and grid.height > 6 * 128  # three rows of drawn ones, and three of real ones
    assert "validation: drawn style" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons of training on such data
def test_small_data_has_two_halves_that_share_nothing(data, tmp_path):
    args = small_data.parse_arguments(["--train_data_dir", str(data), "--work_dir", str(tmp_path), "--quick"])
    with pytest.raises(ValueError, match="has 160 training images, fewer than 200"):
        small_data.split_data(args)
    many = tmp_path / "many"
    many.mkdir()
    rows = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(210)], "text": [str(i) for i in range(210)]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "text": Value("string")})).to_parquet(
        many / "train.parquet"
    )
    args.train_data_dir = str(many)
    halves = load_splits(None, str(small_data.split_data(args)), "image", "text")
    texts = [set(halves[name]["text"]) for name in ("train", "validation")]
    assert [len(half) for half in texts] == [100, 100] and not texts[0] & texts[1]
    jobs = [small_data.make_job(arms.SETTINGS[8], arm, 0, 5, many) for arm in small_data.ARMS]
    assert len({job.name for job in jobs}) == len(jobs) == len(small_data.ARMS)
    parse_arguments(
        [f"--{name}={value}" for name, value in jobs[-1].arguments.items() if not isinstance(value, list)], ""
    )


def test_a_run_is_scored_by_the_scorer_that_is_named(folder, data, scorer):
    captions, real = load_held_out(str(data), 64, 20)
    distances = {f"swd_{size}": value for size, value in sliced_wasserstein(real, real).items()}
    assert score(real, captions, real) == distances  # the captions are not of shapes
    expected = score_images(scorer, real, captions, real)
    assert score(real, captions, real, str(folder)) == distances | expected
    small = real[..., ::2, ::2]  # what a run of two stages leaves on the way
    assert set(score(small, captions, small, str(folder))) == {"swd_32", "swd_16"}


def test_a_pretrained_text_encoder_reaches_the_runs(data, text_encoder, tmp_path):
    """Cores are as long as its width and the tokens allow. Neither records nor reports hold paths."""
    flags = ["--text_encoder", text_encoder, "--max_sequence_length", "24", "--train_data_dir", str(data)]
    for module in (grow_vs_scratch, few_high_res):
        args = module.parse_arguments([*flags, "--results_dir", str(tmp_path)])
        (report,) = module.make_reports(args).values()
        command = report.splitlines()[0]
        assert str(data) not in command and f"--results_dir {tmp_path}/{data.name}-" in command
    small = {"block_out_channels": "4,8", "hidden_size": 64, "num_layers": 1, "num_attention_heads": 1}
    usual, setting = (replace(one[4], **small) for one in (arms.SETTINGS, arms.chosen_size(args)[0]))
    assert setting.build_core().config.cross_attention_dim == 32
    ours = arms.find_arm("ours")
    jobs = arms.make_jobs(setting, ours, 0, data, data)
    for job in [*jobs, arms.plain_job(setting, arms.find_arm("transformer-8"), 0, 2, data)]:
        assert job.arguments["text_encoder"] == text_encoder
        assert (job.arguments["text_hidden_size"], job.arguments["max_sequence_length"]) == (32, 24)
        assert run_inputs(job)["text_encoder"] == Path(text_encoder).name and str(data) not in str(run_inputs(job))
    steps = [arms.make_jobs(one, ours, 0, data, data)[0].arguments["core_steps"] for one in (usual, setting)]
    assert steps[0] != steps[1]


def test_captions_that_the_scorer_does_not_know_stop_the_queue_first(folder, data, tmp_path, queue_arguments):
    other = tmp_path / "other"
    other.mkdir()
    rows = {"image": [Image.new("RGB", (64, 64))] * 2, "text": ["a red moon"] * 2}
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "text": Value("string")})).to_parquet(
            other / f"{split}.parquet"
        )
    jobs = arms.make_jobs(arms.SETTINGS[4], arms.find_arm("scratch"), 0, other, other)
    flags = ["--work_dir", tmp_path / "runs", "--results_dir", tmp_path / "results", "--scorer"]
    with pytest.raises(ValueError, match="1 captions that the scorer does not know, such as ', a red moon'"):
        run_queue(jobs, queue_arguments(*flags, folder))
    with pytest.raises(ValueError, match="`scorer='.*'` is not a trained benchmarks.stickers_scorer"):
        run_queue(jobs, queue_arguments(*flags, other))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_queue_on_stickers(folder, data, text_encoder, tmp_path, queue_arguments, monkeypatch):
    """Runs of both scripts train around a frozen text encoder, and are scored."""
    setting = Setting(64, (8,), "4,8", 2, hidden_size=64, num_layers=1, num_attention_heads=1)
    setting = replace(setting, text_encoder=text_encoder, text_hidden_size=32, max_sequence_length=8)
    ours = growth_job(setting, "scratch", 0, 2 * setting.plans()["joint"].flops, 0.0, data, core=None)
    monkeypatch.setattr(plain, "NUM_LAYERS", 1)
    theirs = arms.plain_job(setting, arms.find_arm("transformer-8"), 0, 2, data)
    folders = ["--work_dir", tmp_path, "--results_dir", tmp_path / "results", "--scorer", folder]
    records = run_queue([ours, theirs], queue_arguments(*folders, "--mixed_precision", "no"))
    for record in records.values():
        (scores,) = record["scores"].values()
        assert list(scores) == ["swd_64", "swd_32", "swd_16", "style", "category", "retrieval", "kid"]
        assert record["curve"][-1]["val_low_noise_loss"] > 0
        assert str(tmp_path) not in str(record) and text_encoder not in str(record)
    first, details = grow_vs_scratch.make_tables(records, setting, None)
    assert [row["arm"] for row in first] == [row["arm"] for row in details] == ["scratch", "transformer-8"]
    assert all(row.values() for row in first) and len(first[0]) == 6
    # The frozen encoder is not saved with the plain model, and is there when it is loaded.
    monkeypatch.undo()
    pipeline = plain.load_trained(tmp_path / theirs.name, theirs.arguments)
    assert draw_images(pipeline, ["red box, filled"], bfloat16=False).isfinite().all()

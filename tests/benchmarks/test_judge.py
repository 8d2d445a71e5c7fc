# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The judge of images, with small random models that are saved and loaded as any other of `transformers`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from benchmarks import judge, metrics
from benchmarks.image_features import ClipModel, FeatureModel
from benchmarks.judge import open_images


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """The folders of a model of each kind."""
    torch.manual_seed(0)
    folders = {}

    def save(name: str, *parts) -> None:
        folders[name] = str(tmp_path_factory.mktemp(name))
        for part in parts:
            part.save_pretrained(folders[name])

    processor = BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    save("dinov2", Dinov2Model(Dinov2Config(**SMALL)), processor)
    save("vit", ViTModel(ViTConfig(**SMALL, intermediate_size=16)), processor)
    save("convnext", ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), processor)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    save("bert", BertModel(config))
    save("unprepared", Dinov2Model(Dinov2Config(**SMALL)))

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    text = CLIPTextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=len(words),
        max_position_embeddings=12,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    vision = CLIPVisionConfig(**SMALL, intermediate_size=16)
    clip = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    clip_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    save("clip", CLIPModel(clip), clip_processor, tokenizer)
    save("clip vision", CLIPVisionModel(vision), clip_processor)
    return folders


def draw(count: int, size: tuple[int, int], seed: int) -> list[Image.Image]:
    """Smooth images of random colors, `size` being (height, width)."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
        for _ in range(count)
    ]


def write_folder(folder: Path, images: list[Image.Image], captions: list[str]) -> str:
    folder.mkdir()
    for i, (image, caption) in enumerate(zip(images, captions)):
        image.save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(caption, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    """A folder of samples, 24 x 24, and parquet files of larger real images."""
    folder = tmp_path_factory.mktemp("judged")
    samples = write_folder(folder / "samples", draw(9, (24, 24), 0), [f"a {'bcd'[i % 3]}" for i in range(9)])
    real = folder / "real"
    real.mkdir()
    features = Features({"image": ImageFeature(), "text": Value("string")})
    for split, count in (("train", 7), ("validation", 5)):
        table = {"image": draw(count, (48, 60), count), "text": ["a b"] * count}
        Dataset.from_dict(table, features=features).to_parquet(real / f"{split}.parquet")
    return samples, str(real)


@pytest.mark.filterwarnings("ignore:The Fréchet distance of")
def test_the_judge_prints_and_writes_all_scores(models, data, tmp_path, capsys):
    samples, real = data
    output = tmp_path / "results" / "judge.json"
    flags = [samples, "--real", real, "--real_split", "validation", "--output", str(output), "--batch_size", "4"]
    judge.main([*flags, "--features", models["dinov2"], "--clip", models["clip"]])
    result = json.loads(output.read_text())
    assert {name: result["samples"][name] for name in ("images", "size", "split")} == {
        "images": 9,
        "size": [24, 24],
        "split": "train",
    }
    assert result["real"] == {"source": real, "split": "validation", "images": 5, "size": [24, 24]}
    assert result["features"]["model"] == models["dinov2"] and result["features"]["features"] == "pooled output"
    assert result["clip"]["features"] == "image embeddings"
    assert result["features"]["resizing"]["crop_size"] == {"height": 16, "width": 16}
    assert [path.name for path in output.parent.iterdir()] == ["judge.json"]

    # By hand, from features of images that were read in another way.
    ours = torch.stack([torch.from_numpy(np.array(image)) for image in draw(9, (24, 24), 0)]).permute(0, 3, 1, 2)
    cropped = [image.resize((24, 24), Image.Resampling.LANCZOS, (6, 0, 54, 48)) for image in draw(5, (48, 60), 5)]
    theirs = torch.stack([torch.from_numpy(np.array(image)) for image in cropped]).permute(0, 3, 1, 2)
    model, clip = FeatureModel(models["dinov2"]), ClipModel(models["clip"])
    scores = result["scores"]
    assert list(scores) == ["fid", "kid", "precision", "recall", "cmmd", "clip_score"]
    assert scores["fid"] == pytest.approx(metrics.frechet_distance(model(ours), model(theirs)), rel=1e-4)
    assert scores["kid"] == pytest.approx(metrics.kernel_distance(model(ours), model(theirs)), rel=1e-4)
    assert (scores["precision"], scores["recall"]) == metrics.precision_recall(model(ours), model(theirs))
    assert scores["cmmd"] == pytest.approx(metrics.clip_distance(clip(ours), clip(theirs)), rel=1e-4)
    texts = clip.embed_texts([f"a {'bcd'[i % 3]}" for i in range(9)])
    assert scores["clip_score"] == pytest.approx(metrics.clip_score(clip(ours), texts), rel=1e-4)

    table = capsys.readouterr().out
    assert "9 samples and 5 real images of 24 x 24 px." in table
    assert f"| FID | {scores['fid']:.4g} | pooled output of {models['dinov2']} |" in table


def test_one_model_brings_its_own_scores(models, data, tmp_path, capsys):
    """Images that are not square, and captions, from one folder: it is like itself."""
    folder = write_folder(tmp_path / "wide", draw(5, (16, 24), 1), ["b", "c", "d", "b", "c"])
    output = tmp_path / "judge.json"
    flags = [folder, "--real", folder, "--output", str(output)]
    judge.main([*flags, "--clip", models["clip"]])
    result = json.loads(output.read_text())
    assert list(result["scores"]) == ["cmmd", "clip_score"] and result["samples"]["size"] == [16, 24]
    assert result["scores"]["cmmd"] == pytest.approx(0, abs=1e-9)
    assert "24 x 16 px" in capsys.readouterr().out


def test_images_that_are_equal_count_each(models, tmp_path):
    """A model that draws the same image for all captions must not look like one that drew a single image."""
    rows = {"image": draw(1, (24, 24), 0) * 4, "text": ["b", "c", "d", "e"]}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    images = open_images("samples", str(tmp_path / "train.parquet"))
    assert len(images.rows) == 4 and images.captions == ["b", "c", "d", "e"]


@pytest.mark.parametrize(
    "name,output,of_hidden",
    [
        ("dinov2", "pooled output", lambda model, pixels: model(pixels).last_hidden_state[:, 0]),  # normalized already
        ("clip vision", "pooled output", lambda model, pixels: model(pixels).pooler_output),
        ("vit", "pooled output", lambda model, pixels: model(pixels).pooler_output),
        ("convnext", "pooled output", lambda model, pixels: model(pixels).pooler_output),
        ("clip", "image embeddings", lambda model, pixels: model.get_image_features(pixels).pooler_output),
    ],
)
@torch.no_grad()
def test_features_are_the_output_that_is_named(models, name, output, of_hidden):
    """They equal those of the model itself for images that need no resizing."""
    images = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = FeatureModel(models[name])
    mean, std = (torch.tensor(one)[:, None, None] for one in (model.processor.image_mean, model.processor.image_std))
    features = model(images)
    assert model.output == output and model.describe()["features"] == output
    torch.testing.assert_close(features, of_hidden(model.model, (images / 255 - mean) / std), atol=1e-4, rtol=1e-4)
    half = FeatureModel(models[name], dtype=torch.bfloat16)(images)
    assert half.dtype == torch.float32 and 0 < (half - features).abs().max() < 0.2


def remove_weights(source: str, target: Path, word: str) -> str:
    """Copy a model without the weights that have `word` in their names."""
    target.mkdir()
    for path in Path(source).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(target / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if word not in name}
    assert len(kept) < len(weights)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_an_untrained_pooler_is_not_used(models, tmp_path):
    """Classifiers' checkpoints lack it, and `transformers` fills it with noise: the class token is taken."""
    folder = remove_weights(models["vit"], tmp_path / "vit", "pooler")
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    model, again = FeatureModel(folder), FeatureModel(folder)
    assert torch.equal(model(images), again(images)) and model.output == "class token"
    with pytest.raises(ValueError, match="lacks weights of ViTModel, such as .*: its features would be random"):
        FeatureModel(remove_weights(models["vit"], tmp_path / "broken", "layernorm"))


def test_bad_models(models):
    with pytest.raises(
        ValueError, match="is a BertModel, which reads input_ids, not images alone: name a vision model"
    ):
        FeatureModel(models["bert"])
    with pytest.raises(ValueError, match="`features=.* has no image processor: name a vision model"):
        FeatureModel(models["unprepared"])
    with pytest.raises(ValueError, match="`clip=.* is a Dinov2Model, which does not embed texts"):
        ClipModel(models["dinov2"])
    with pytest.raises(ValueError, match="`features='no/such/folder'` cannot be loaded as a model"):
        FeatureModel("no/such/folder")


def test_long_captions_are_reported(models):
    clip = ClipModel(models["clip"])
    with pytest.warns(UserWarning, match="reads 12 tokens: longer captions are cut off"):
        texts = clip.embed_texts(["a b c d e f g h i j k l m n o p", "a"])
    assert texts.shape == (2, 12)


def test_bad_images(models, data, tmp_path):
    samples, real = data
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`samples=.*empty'`, split 'train', cannot be read: .* holds nothing"):
        open_images("samples", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="`real=.*, split 'test', cannot be read: .* whose splits are"):
        open_images("real", real, "test")
    model = FeatureModel(models["dinov2"])
    mixed = write_folder(tmp_path / "mixed", [*draw(2, (24, 24), 0), *draw(1, (24, 30), 0)], ["b", "c", "d"])
    with pytest.raises(
        ValueError, match="several sizes: row 0 is 24 x 24 and row 2 is 30 x 24. Judge images of one size"
    ):
        judge.judge(open_images("samples", mixed), open_images("real", real, size=(24, 24)), model)
    with pytest.raises(
        ValueError, match=r"`samples` of size \(24, 24\) and `real` of size \(32, 32\) must be of one size"
    ):
        judge.judge(open_images("samples", samples), open_images("real", real, size=(32, 32)), model)
    (tmp_path / "mixed" / "001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="`samples=.*mixed'`, row 1: .*. Repair or remove it."):
        judge.judge(open_images("samples", mixed), open_images("real", real, size=(24, 24)), model)
    (tmp_path / "mixed" / "000.txt").write_text("")
    with pytest.raises(ValueError, match="needs a caption per sample; row 0 has none"):
        judge.judge(
            open_images("samples", mixed), open_images("real", real, size=(24, 24)), clip=ClipModel(models["clip"])
        )
    with pytest.raises(ValueError, match="Name a model to judge by"):
        judge.judge(open_images("samples", samples), open_images("real", real, size=(24, 24)))


def test_bad_arguments(data, capsys):
    for flags, message in (([], "Name a model"), (["--clip", "x", "--batch_size", "0"], "`--batch_size=0` must be")):
        with pytest.raises(SystemExit):
            judge.main([data[0], "--real", data[1], *flags])
        assert message in capsys.readouterr().err

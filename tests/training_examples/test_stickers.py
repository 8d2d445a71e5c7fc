# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`data/stickers.py` on tiny packages from a registry on the loopback interface: what it draws, leaves out and holds out."""

import base64
import functools
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.sources import load_splits
from training_examples.data import stickers
from training_examples.data.stickers import (
    IconSet,
    assign_splits,
    build,
    read_icons,
    select,
    strip_skin_tone,
    unify_categories,
    unify_names,
)


PETS = [f"pet-{i}" for i in range(60)]
COLORS = {"round": "#ff0000", "square set": "#0000ff"}
CIRCLE = '<circle cx="8" cy="8" r="4" fill="#ff0000"/>'
SQUARE = '<path d="M0 0h16v8H0z" fill="#0000ff"/>'


def make_package(body: str, categories: dict[str, list[str]] | None, spdx: str, **more: dict) -> dict[str, dict]:
    """The files of a package of 60 pets and of the icons in `more`."""
    icons = {name: {"body": body} for name in PETS} | {"no-body": {"body": "", "hidden": True}} | more
    info = {
        "name": "Tiny",
        "author": {"name": "Ann", "url": "https://example.org/ann"},
        "license": {"title": f"The {spdx}", "spdx": spdx, "url": "https://example.org/license"},
    }
    metadata = {} if categories is None else {"metadata.json": {"categories": categories}}
    return {"icons.json": {"prefix": "tiny", "icons": icons, "width": 16, "height": 16}, "info.json": info, **metadata}


def publish(registry: Path, style: str, files: dict[str, dict]) -> IconSet:
    """Pack files as `npm pack` does, and put them where a registry has them."""
    name = style.replace(" ", "-")
    path = registry / "@iconify-json" / name / "-" / f"{name}-1.0.0.tgz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            member, data = tarfile.TarInfo(f"package/{file}"), json.dumps(content).encode()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return IconSet(style, name, "1.0.0", f"sha512-{digest}")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Iterator[tuple[str, list[IconSet]]]:
    """The address of a registry, and two sets. The first has a tall flag, people and a logo; the second no categories."""
    folder = tmp_path_factory.mktemp("registry")
    tones = ["light", "medium-light", "medium", "medium-dark", "dark"]
    people = {f"man-{i}-{tone}-skin-tone": {"body": CIRCLE} for i in range(8) for tone in tones}
    flag = {"flag-x": {"body": '<path d="M0 0h8v16H0z"/>', "width": 8}, "logo": {"body": CIRCLE}}
    categories = {"Animals Nature": PETS, "Flags": ["flag-x"], "People": [*people], "Extras Openmoji": ["logo"]}
    sets = [
        publish(folder, "round", make_package(CIRCLE, categories, "MIT", **people, **flag)),
        publish(folder, "square set", make_package(SQUARE, None, "Apache-2.0")),
    ]

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", sets
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def built(packages, tmp_path_factory) -> Path:
    """The folder of the two sets at 32 px."""
    registry, sets = packages
    out = tmp_path_factory.mktemp("built") / "stickers"
    counts = build(out, sets, 32, registry)
    assert counts == {name: rows.num_rows for name, rows in load_dataset(str(out)).items()}
    assert [path.name for path in out.parent.iterdir()] == ["stickers"]
    return out


def test_grow_reads_the_folder(built):
    splits = load_splits(None, str(built), "image", "text")
    assert {*splits} == {"train", "validation", "test"}
    images = CaptionedImages(splits["train"], 16)
    captions = {images[i]["caption"] for i in range(len(images))}
    assert captions <= {f"pet {i}, {style}" for i in range(60) for style in COLORS} | {
        caption for caption in captions if caption.startswith(("man ", "flag x, round"))
    }
    assert len(captions) == len(images) and images[0]["pixel_values"].shape == (3, 16, 16)


def test_the_columns_and_the_drawings(built):
    rows = load_dataset(str(built), split="train")
    assert rows.column_names == ["image", "text", "name", "style", "category"]
    for row in rows:
        assert row["text"] == f"{row['name']}, {row['style']}" and row["image"].format == "WEBP"
        pixels = np.asarray(row["image"]).astype(int)
        assert pixels.shape == (32, 32, 3)
        if row["name"].startswith("pet"):
            assert row["category"] == "Animals & Nature"  # also of the set that names no categories
            top, bottom = pixels[4, 16], pixels[28, 16]
            painted = {"round": pixels[16, 16], "square set": top}[row["style"]]
            color = [int(COLORS[row["style"]][i : i + 2], 16) for i in (1, 3, 5)]
            assert abs(painted - color).max() < 12 and abs(bottom - 255).max() < 12
        if row["name"] == "flag x":  # tall: in the middle, not stretched
            assert pixels[16, 16].max() < 12 and pixels[16, 2].min() > 243 and pixels[16, 29].min() > 243


def test_what_is_held_out(built):
    splits = {name: {(row["name"], row["style"]) for row in rows} for name, rows in load_dataset(str(built)).items()}
    pets = {name: {pair for pair in pairs if pair[0].startswith("pet")} for name, pairs in splits.items()}
    seen = {name for name, _ in pets["train"]}
    assert pets["validation"] and pets["test"]
    assert not seen & {name for name, _ in pets["test"]}
    assert {name for name, _ in pets["validation"]} <= seen
    assert sum(map(len, pets.values())) == 120 == len(set.union(*pets.values()))
    # A subject's skin tones are held out together.
    subjects = [{name[:5] for name, _ in pairs if name.startswith("man")} for pairs in splits.values()]
    assert sum(map(len, subjects)) == len(set.union(*subjects)) > 0


def test_skin_tones_are_thinned_out(built):
    rows = [row for split in load_dataset(str(built)).values() for row in split.select_columns("name")]
    assert 1 <= sum("skin tone" in row["name"] for row in rows) <= 12  # an eighth of 40 is expected
    assert not any(row["name"] in ("logo", "no body") for row in rows)


def test_licenses_are_written_and_printed(built, packages, tmp_path, capsys):
    registry, sets = packages
    card = DatasetCard.load(built / "README.md")
    assert card.data.license == ["apache-2.0", "mit"] and "| train |" in card.text
    licenses = (built / "LICENSES.md").read_text()
    assert "[Tiny](https://example.org/ann) by Ann, The MIT" in licenses and "Copyright (c) Ann" in licenses
    assert "Apache License" in (built / "LICENSE-Apache-2.0.txt").read_text()
    build(tmp_path / "out", sets[:1], 16, registry)
    assert "**round**: [Tiny](https://example.org/ann) by Ann, The MIT" in capsys.readouterr().out
    assert not (tmp_path / "out" / "LICENSE-Apache-2.0.txt").exists()


def test_a_single_style_holds_out_subjects_only(packages, tmp_path):
    registry, sets = packages
    assert {*build(tmp_path / "out", sets[1:], 16, registry)} == {"train", "test"}
    assert not (tmp_path / "out" / "validation.parquet").exists()


def test_leaving_out(packages, tmp_path):
    registry, sets = packages
    build(tmp_path / "out", sets, 16, registry, ["People & Body", "Flags"], ["pet 1*"])
    names = {row["name"] for split in load_dataset(str(tmp_path / "out")).values() for row in split}
    assert names == {f"pet {i}" for i in range(60) if not str(i).startswith("1")}
    build(tmp_path / "plain", sets, 16, registry, ["skin tones"])
    names = {row["name"] for split in load_dataset(str(tmp_path / "plain")).values() for row in split}
    assert names == {f"pet {i}" for i in range(60)} | {"flag x"}


def test_skin_tones_without_the_word_are_found():
    names = {"man", *(f"man {tone}" for tone in ("light", "medium light", "medium dark")), "traffic light", "traffic"}
    assert {name: strip_skin_tone(name, names) for name in names} == {
        "man": "man", "man light": "man", "man medium light": "man", "man medium dark": "man",
        "traffic light": "traffic light", "traffic": "traffic",
    }  # fmt: skip
    assert strip_skin_tone("men dark skin tone light skin tone", names) == "men"
    # A set that writes names in one word shares its splits with the others.
    first = read_icons("a", {"icons.json": {"icons": {"french-fries": {"body": ""}, "flag-x": {"body": ""}}}})
    second = read_icons("b", {"icons.json": {"icons": {"frenchfries": {"body": ""}, "flag-for-x": {"body": ""}}}})
    assert {icon.subject for icon in first} == {icon.subject for icon in second} == {"frenchfries", "flagx"}


def test_splits_do_not_depend_on_what_is_left_out():
    icons = [
        icon
        for style in ("a", "b", "c")
        for icon in read_icons(style, {"icons.json": {"icons": {name: {"body": ""} for name in PETS}}})
    ]
    whole = {(icon.name, icon.style): name for name, split in assign_splits(icons).items() for icon in split}
    part = {(i.name, i.style): name for name, split in assign_splits(icons[::-2]).items() for i in split}
    assert (
        sum(whole[key] == part[key] for key in part) >= len(part) - 3
    )  # of a style that is alone now, none is held out
    assert {whole[key] for key in part} == {"train", "validation", "test"}


def test_names_are_spelled_in_words():
    """A set that writes in one word is given the spelling of others, or words of other names where it is alone."""
    names = ["cowface", "cow face", "bear face", "strawberry", "strawberry", "straw hat", "red berry", "polarbearface"]
    names += ["polar night", "crocodile", "flag for x", "flag x", "jack o lantern", "jack-o-lantern"]
    assert unify_names(names) == {
        **{name: name for name in names},
        "cowface": "cow face",
        "polarbearface": "polar bear face",
        "flag x": "flag for x",
        "jack-o-lantern": "jack o lantern",
    }


def test_icons_get_names_in_words():
    icons = [
        icon
        for style, names in (("a", ["cow-face", "hot-dog-medium-dark", "hot-dog"]), ("b", ["cowface", "hotdog"]))
        for icon in read_icons(style, {"icons.json": {"icons": {name: {"body": ""} for name in names}}})
    ]
    assert [(icon.name, icon.base) for icon in select(icons, [], [])] == [
        ("cow face", "cow face"), ("hot dog", "hot dog"), ("hot dog medium dark", "hot dog"),
        ("cow face", "cow face"), ("hot dog", "hot dog"),
    ]  # fmt: skip
    assert [icon.name for icon in select(icons, ["skin tones"], ["cow *"])] == ["hot dog", "hot dog"]


def test_categories_are_those_of_most_sets():
    subjects, categories = ["cat", "cat", "cat", "cat", "?"], ["Objects", "Nature", "Animals & Nature", "", "Unknown"]
    assert unify_categories(subjects, categories) == [*["Animals & Nature"] * 4, ""]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"size": 8}, "`size=8` must be from 16 to 1024"),
        ({"leave_out": ["Cats"]}, r"`leave_out=\['Cats'\]` is unknown: choose from \['Activities'"),
        ({"registry": "http://127.0.0.1:9"}, "round-1.0.0.tgz cannot be downloaded .* pass another `registry` than"),
        ({"registry": "nowhere"}, "cannot be downloaded .* pass another `registry` than 'nowhere'"),
        ({"leave_out_names": ["*"]}, r"`leave_out_names=\['\*'\]` leave nothing"),
    ],
)
def test_bad_arguments(packages, tmp_path, arguments, message):
    registry, sets = packages
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", **{"sets": sets, "registry": registry, **arguments})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(packages, tmp_path, capsys):
    registry, sets = packages
    with pytest.raises(ValueError, match="exists: remove it, or name another folder"):
        build(tmp_path, sets, 16, registry)
    with pytest.raises(SystemExit):
        stickers.main([str(tmp_path), "--registry", registry])
    assert "exists: remove it" in capsys.readouterr().err


def test_a_package_that_was_changed(packages, tmp_path):
    registry, sets = packages
    changed = IconSet(sets[0].style, sets[0].package, "1.0.0", sets[1].integrity)
    with pytest.raises(ValueError, match="has the digest sha512-.*, not sha512-.* of the published package"):
        build(tmp_path / "out", [changed], 16, registry)


def test_categories_that_only_other_sets_know(packages, tmp_path):
    registry, sets = packages
    with pytest.raises(ValueError, match=r"the categories of \['square set'\] are only known from other sets"):
        build(tmp_path / "out", sets[1:], 16, registry, ["Flags"])


def test_a_drawing_that_is_broken(packages, tmp_path):
    broken = publish(tmp_path, "broken", make_package("<circle", None, "MIT"))
    with pytest.raises(ValueError, match="'pet .*' of broken cannot be drawn"):
        build(tmp_path / "out", [broken], 16, tmp_path.as_uri())
    assert not (tmp_path / "out").exists()

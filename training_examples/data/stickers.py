# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Draw the captioned stickers: emoji in seven styles, from the vector sets of the npm packages `@iconify-json/*`.

    pip install -e ".[stickers]"
    python training_examples/data/stickers.py data/stickers                          # 256 px, about seven minutes on one core
    python training_examples/data/stickers.py data/objects --leave_out "People & Body" Flags --leave_out_names "*clock*"
    accelerate launch training_examples/grow.py --train_data_dir data/stickers --resolutions 64 256

OUT holds a parquet file per split with the columns `image` (WebP, on white), `text` ("name, style"), `name`, `style` and
`category`, a README.md and the licenses. Names are spelled in words, also those of a set that writes "cowface". A *subject* is a
name without its skin tone, however a set spells it. The split depends on hashes of subject and style alone, so that it is the
same everywhere:

- `test`: subjects that no image of the other splits shows.
- `validation`: subjects that `train` shows in other styles, never in this one.
"""

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from datasets import Dataset, Features, Image, Value
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image as PILImage

from diffusers_greedy_grow.training.files import remove_folder, write_text


@dataclass(frozen=True)
class IconSet:
    """An icon set: a style, its package `@iconify-json/<package>`, the version, and npm's digest of that version."""

    style: str
    package: str
    version: str
    integrity: str


# fmt: off
SETS = (
    IconSet("noto", "noto", "1.2.9", "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    IconSet("twemoji", "twemoji", "1.2.5", "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    IconSet("fluent", "fluent-emoji", "1.2.7", "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="),
    IconSet("fluent flat", "fluent-emoji-flat", "1.2.6", "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    IconSet("openmoji", "openmoji", "1.2.29", "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
    IconSet("emojione", "emojione", "1.2.3", "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    IconSet("firefox", "fxemoji", "1.2.2", "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="),
)
# fmt: on

PUBLIC_REGISTRY = "https://registry.npmjs.org"

CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
# How the sets spell these categories. "People" of two sets has smileys too, as far as no other set knows better.
SPELLINGS = {
    **{category.replace(" &", ""): category for category in CATEGORIES},
    **{category: category for category in CATEGORIES},
    "Food": "Food & Drink",
    "Nature": "Animals & Nature",
    "People": "People & Body",
    "Places": "Travel & Places",
    "Travel": "Travel & Places",
}
# OpenMoji's logos and interface icons, which no other set has.
EXTRAS = ("Extras Openmoji", "Extras Unicode")

SKIN_TONES = "skin tones"
TONE = "(?:medium light|medium dark|light|medium|dark)"
# Most skin tones repeat what is known. Fluent's, which are named "man dark", are fewer per subject, and all are kept.
SKIN_TONE_SHARE = 1 / 8
TEST_SHARE = 0.03
VALIDATION_SHARE = 0.06

FEATURES = Features({"image": Image(), **dict.fromkeys(("text", "name", "style", "category"), Value("string"))})

MIT = """
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES
OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE
LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR
IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
""".strip()


@dataclass(frozen=True)
class Icon:
    """An icon: `name`, `style`, `category` ("" if unknown), `base` (the name without its skin tone), and the drawing."""

    name: str
    style: str
    category: str
    base: str
    svg: str

    @property
    def subject(self) -> str:
        return find_subject(self.base)


# ----------------------------------------------------------------------------------------------------------------------
# Packages
def find_registry() -> str:
    """Return the registry that npm is configured to use, or the public one without npm."""
    npm = shutil.which("npm")
    if npm is None:
        return PUBLIC_REGISTRY
    found = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True).stdout.strip()
    return found if found.startswith("http") else PUBLIC_REGISTRY


def download(icon_set: IconSet, registry: str) -> dict[str, dict]:
    """
    Return the content of `icons.json`, `info.json` and, if the set has categories, `metadata.json` of a package.

    Raises:
        `ValueError`: if the package cannot be downloaded, or is not the one that was published under this version.
    """
    name = icon_set.package
    url = f"{registry.rstrip('/')}/@iconify-json/{name}/-/{name}-{icon_set.version}.tgz"
    try:
        with urlopen(url, timeout=120) as response:
            content = response.read()
    except (URLError, ValueError, OSError) as error:
        raise ValueError(
            f"{url} cannot be downloaded ({error}); pass another `registry` than {registry!r}."
        ) from error
    digest = f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"
    if digest != icon_set.integrity:
        raise ValueError(
            f"{url} has the digest {digest}, not {icon_set.integrity} of the published package; pass another `registry`."
        )
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if member.name in ("package/icons.json", "package/info.json", "package/metadata.json"):
                files[Path(member.name).name] = json.load(archive.extractfile(member))  # type: ignore[arg-type]
    return files


def read_icons(style: str, files: dict[str, dict]) -> list[Icon]:
    """Return the icons of a package's `files` in the order of their names, without hidden ones, aliases and extras."""
    icons, categories = files["icons.json"], {}
    for category, members in files.get("metadata.json", {}).get("categories", {}).items():
        categories.update(dict.fromkeys(members, category))
    found = []
    for key, icon in sorted(icons["icons"].items()):
        category = categories.get(key, "")
        if not icon.get("hidden") and category not in EXTRAS:
            box = [icon.get(side, icons.get(side, default)) for side, default in
                   (("left", 0), ("top", 0), ("width", 16), ("height", 16))]  # fmt: skip
            name, view_box = key.replace("-", " "), " ".join(map(str, box))
            found.append(Icon(name, style, category, name, f'viewBox="{view_box}">{icon["body"]}</svg>'))
    names = {icon.name for icon in found}
    return [replace(icon, base=strip_skin_tone(icon.name, names)) for icon in found]


# ----------------------------------------------------------------------------------------------------------------------
# Names and categories
def strip_skin_tone(name: str, names: Iterable[str]) -> str:
    """
    Return a name without its skin tone: "man" for "man dark skin tone", and for "man dark" if "man medium dark" is one of
    `names`, so that a "traffic light" stays one.
    """
    base = re.sub(rf" {TONE} skin tone", "", name)
    ending = re.fullmatch(rf"(.*?) {TONE}", base)
    return ending[1] if ending and f"{ending[1]} medium dark" in names else base


def find_subject(name: str) -> str:
    """Return what a name without skin tone has in common with its other spellings: "frenchfries", "flagangola"."""
    return re.sub(r"[^a-z0-9]", "", re.sub("^flag for ", "flag ", name.lower()))


def split_words(name: str, words: Container[str]) -> str:
    """Return a name that is written in one word as the fewest `words`, "medical mask" for "medicalmask", or as it is."""
    best: dict[int, list[str]] = {0: []}  # the words of its first letters, by their number
    for end in range(1, len(name) + 1):
        endings = [[*best[start], name[start:end]] for start in best if name[start:end] in words]
        if endings:
            best[end] = min(endings, key=len)
    return " ".join(best.get(len(name), [name]))


def unify_names(names: Sequence[str]) -> dict[str, str]:
    """
    Return for each name the spelling with the most words that any set has, "cow face" for "cowface", which a text encoder
    may not know. A name that one set alone has, in one word, becomes words that are in other names.
    """
    spellings: dict[str, Counter] = defaultdict(Counter)
    for name in names:
        spellings[find_subject(name)][name] += 1
    best = {
        subject: max(sorted(counts), key=lambda name: (name.count(" "), counts[name]))
        for subject, counts in spellings.items()
    }
    counts = Counter(names)
    words = {word for name in counts if " " in name or counts[name] > 1 for word in name.split() if len(word) > 1}
    return {name: split_words(best[find_subject(name)], words) for name in counts}


def unify_categories(subjects: Sequence[str], categories: Sequence[str]) -> list[str]:
    """Return one of `CATEGORIES` per icon, the one that most sets give its subject, or "" if no set gives any."""
    votes: dict[str, Counter] = defaultdict(Counter)
    for subject, category in zip(subjects, categories):
        if category in SPELLINGS:
            votes[subject][SPELLINGS[category]] += 1
    best = {subject: counts.most_common(1)[0][0] for subject, counts in votes.items()}
    return [best.get(subject, "") for subject in subjects]


def select(icons: list[Icon], leave_out: Sequence[str], leave_out_names: Sequence[str]) -> list[Icon]:
    """
    Return the icons with one spelling of names and categories, without those that are left out, and without most skin tones.

    Raises:
        `ValueError`: if a category is left out and the categories of a set are unknown, or if nothing is left.
    """
    unified = unify_categories([icon.subject for icon in icons], [icon.category for icon in icons])
    names = unify_names([icon.name for icon in icons] + [icon.base for icon in icons if icon.base != icon.name])
    icons = [
        replace(icon, name=names[icon.name], base=names[icon.base], category=category)
        for icon, category in zip(icons, unified)
    ]
    unknown = {icon.style for icon in icons} - {icon.style for icon in icons if icon.category}
    if unknown and {*leave_out} - {SKIN_TONES}:
        raise ValueError(
            f"`leave_out={[*leave_out]}`: the categories of {sorted(unknown)} are only known from other sets; add "
            "'fluent flat' to `sets`."
        )
    kept = [
        icon
        for icon in icons
        if icon.category not in leave_out
        and not any(fnmatchcase(icon.name, pattern) for pattern in leave_out_names)
        and not (SKIN_TONES in leave_out and icon.name != icon.base)
        and not ("skin tone" in icon.name and fraction(icon.name) >= SKIN_TONE_SHARE)
    ]
    if not kept:
        raise ValueError(f"`leave_out={[*leave_out]}` and `leave_out_names={[*leave_out_names]}` leave nothing.")
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# Splits
def fraction(text: str) -> float:
    """Return a number in [0, 1) that looks random and is always the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def assign_splits(icons: Sequence[Icon]) -> dict[str, list[Icon]]:
    """Return the icons by split, without empty splits."""
    styles: dict[str, set[str]] = defaultdict(set)
    for icon in icons:
        styles[icon.subject].add(icon.style)
    held_out = {
        subject: {style for style in known if fraction(f"{subject}, {style}") < VALIDATION_SHARE}
        for subject, known in styles.items()
    }
    splits: dict[str, list[Icon]] = {"train": [], "validation": [], "test": []}
    for icon in icons:
        if fraction(icon.subject) < TEST_SHARE:
            splits["test"].append(icon)
        elif icon.style in held_out[icon.subject] and held_out[icon.subject] != styles[icon.subject]:
            splits["validation"].append(icon)
        else:
            splits["train"].append(icon)
    return {name: split for name, split in splits.items() if split}


# ----------------------------------------------------------------------------------------------------------------------
# Images
def draw(svg: str, size: int) -> bytes:
    """Return a WebP file of `size` x `size` pixels, with the drawing in the middle of a white square."""
    import resvg_py  # an extra: names, categories and splits work without it

    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    document = f'<svg {namespaces} width="{size}" height="{size}" {svg}'
    png = resvg_py.svg_to_bytes(svg_string=document, background="white", skip_system_fonts=True)
    buffer = io.BytesIO()
    PILImage.open(io.BytesIO(png)).convert("RGB").save(buffer, "WEBP", quality=92, method=6)
    return buffer.getvalue()


def to_row(icon: dict, size: int) -> dict:
    """Return the row of an icon's fields."""
    try:
        image = draw(icon["svg"], size)
    except ValueError as error:
        raise ValueError(f"{icon['name']!r} of {icon['style']} cannot be drawn: {error}") from error
    return {"image": {"bytes": image, "path": None}, "text": f"{icon['name']}, {icon['style']}"}


def draw_split(icons: Sequence[Icon], size: int, num_proc: int | None) -> Dataset:
    """Return the rows of a split, shuffled."""
    rows = Dataset.from_list([asdict(icon) for icon in icons]).shuffle(seed=0)
    rows = rows.map(to_row, fn_kwargs={"size": size}, remove_columns=["svg", "base"], num_proc=num_proc)
    return rows.select_columns([*FEATURES]).cast(FEATURES)


# ----------------------------------------------------------------------------------------------------------------------
# What is written
def attribute(icon_set: IconSet, info: dict) -> str:
    """Return the attribution of a set, as its license asks for it."""
    author, license = info["author"], info["license"]
    return (
        f"**{icon_set.style}**: [{info['name']}]({author.get('url', '')}) by {author['name']}, {license['title']} "
        f"([{license.get('spdx', license['title'])}]({license.get('url', '')})); from the npm package "
        f"@iconify-json/{icon_set.package} {icon_set.version}"
    )


def write_licenses(folder: Path, sets: Sequence[IconSet], infos: Sequence[dict]) -> None:
    """Write LICENSES.md and, for sets under the Apache License, its text."""
    lines = [
        "# Licenses",
        "",
        "The images are drawn on white from these sets; nothing else was changed. Models trained on them",
    ]
    lines += ["should name the sets and their licenses. Images of share-alike sets stay under their license.", ""]
    lines += [f"- {attribute(icon_set, info)}" for icon_set, info in zip(sets, infos)]
    spdx = {info["license"].get("spdx") for info in infos}
    for owner in sorted({info["author"]["name"] for info in infos if info["license"].get("spdx") == "MIT"}):
        lines += ["", f"## MIT License, Copyright (c) {owner}", "", MIT]
    if "Apache-2.0" in spdx:
        shutil.copy(Path(__file__).resolve().parents[2] / "LICENSE", folder / "LICENSE-Apache-2.0.txt")
        lines += ["", "The text of the Apache License is in LICENSE-Apache-2.0.txt."]
    write_text(folder / "LICENSES.md", "\n".join(lines) + "\n")


def make_card(splits: dict[str, list[Icon]], sets: Sequence[IconSet], infos: Sequence[dict], size: int) -> DatasetCard:
    """Return the data set's README.md, with the metadata that the Hub reads."""
    data = DatasetCardData(
        language="en",
        license=sorted({info["license"].get("spdx", "other").lower() for info in infos}),
        task_categories=["text-to-image"],
        pretty_name="Stickers",
        tags=["emoji", "stickers"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{name}.parquet"} for name in splits],
            }
        ],
    )
    held_out = {
        "train": "",
        "validation": "subjects that were seen in other styles, never in this one",
        "test": "subjects that were never seen in any style",
    }
    styles = Counter(icon.style for split in splits.values() for icon in split)
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# Stickers: captioned emoji, {len(sets)} styles, {size} px\n",
        f'{sum(styles.values()):,} images, drawn on white from vector sets, WebP. Columns: `image`, `text` ("name, style"),',
        "`name`, `style`, `category` (empty if unknown).\n",
        "| split | images | what is held out |\n| --- | --- | --- |",
        *[f"| {name} | {len(split):,} | {held_out[name]} |" for name, split in splits.items()],
        "\n| style | images | package | license |\n| --- | --- | --- | --- |",
        *[
            f"| {icon_set.style} | {styles[icon_set.style]:,} | @iconify-json/{icon_set.package} {icon_set.version} | "
            f"{info['license'].get('spdx', info['license']['title'])} |"
            for icon_set, info in zip(sets, infos)
        ],
        "\nA *subject* is a name without its skin tone. LICENSES.md names the authors. A model trained on these images has to",
        "name the sets and their licenses.",
    ]
    return DatasetCard("\n".join(lines) + "\n")


def build(
    out: Path,
    sets: Sequence[IconSet] = SETS,
    size: int = 256,
    registry: str | None = None,
    leave_out: Sequence[str] = (),
    leave_out_names: Sequence[str] = (),
    num_proc: int | None = None,
) -> dict[str, int]:
    """
    Write the data set to the folder `out`, which appears when it is complete.

    Args:
        out (`Path`): The folder, which must not exist.
        sets (sequence of [`IconSet`]): The sets to draw.
        size (`int`): The images' size in pixels, from 16 to 1024.
        registry (`str`, *optional*): The address of an npm registry; npm's own by default.
        leave_out (sequence of `str`): Categories to leave out, and "skin tones".
        leave_out_names (sequence of `str`): Patterns of names to leave out, such as "*clock*".
        num_proc (`int`, *optional*): The number of processes that draw.

    Returns:
        `dict[str, int]`: The number of images by split.

    Raises:
        `ValueError`: if `out` exists, an argument is out of its range, or a package cannot be downloaded.
    """
    if out.exists():
        raise ValueError(f"`out={str(out)!r}` exists: remove it, or name another folder.")
    if not 16 <= size <= 1024:
        raise ValueError(f"`size={size}` must be from 16 to 1024.")
    if unknown := {*leave_out} - {*CATEGORIES, SKIN_TONES}:
        raise ValueError(f"`leave_out={sorted(unknown)}` is unknown: choose from {[*CATEGORIES, SKIN_TONES]}.")
    if importlib.util.find_spec("resvg_py") is None:
        raise ValueError(
            "The drawings need resvg-py: pip install 'diffusers-greedy-grow[stickers]', or pip install resvg-py."
        )
    registry = registry or find_registry()
    icons, infos = [], []
    for icon_set in sets:
        files = download(icon_set, registry)
        print(attribute(icon_set, files["info.json"]), flush=True)
        infos.append(files["info.json"])
        icons += read_icons(icon_set.style, files)
    splits = assign_splits(select(icons, leave_out, leave_out_names))

    temporary = out.with_name(out.name + ".tmp")
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    for name, split in splits.items():
        draw_split(split, size, num_proc).to_parquet(temporary / f"{name}.parquet")
    write_licenses(temporary, sets, infos)
    make_card(splits, sets, infos, size).save(temporary / "README.md")
    temporary.rename(out)
    return {name: len(split) for name, split in splits.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("out", type=Path, help="The folder to write; it must not exist.")
    parser.add_argument("--size", type=int, default=256, help="The size of the images in pixels.")
    parser.add_argument(
        "--sets", nargs="+", default=[s.style for s in SETS], choices=[s.style for s in SETS], help="Styles to draw."
    )
    parser.add_argument(
        "--leave_out", nargs="+", default=[], choices=[*CATEGORIES, SKIN_TONES], help="Categories to leave out."
    )
    parser.add_argument(
        "--leave_out_names", nargs="+", default=[], help='Patterns of names to leave out, such as "*clock*".'
    )
    parser.add_argument(
        "--registry", help=f"The npm registry; by default npm's own, or {PUBLIC_REGISTRY} without npm."
    )
    parser.add_argument("--num_proc", type=int, help="The number of processes that draw; one by default.")
    args = parser.parse_args(argv)
    options = vars(args) | {"sets": [icon_set for icon_set in SETS if icon_set.style in args.sets]}
    try:
        counts = build(**options)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()

# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The versions of a release agree, and the workflows call targets of the Makefile."""

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from diffusers_greedy_grow.registration import SUPPORTED

from .release.check_dist import compare_sdist, compare_wheels


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


# ----------------------------------------------------------------------------------------------------------------------
# Versions


def read_requirements(*extras: str) -> list[Requirement]:
    """The dependencies, and those of some extras, without those that only name other extras."""
    listed = [
        *PROJECT["dependencies"],
        *(text for extra in extras for text in PROJECT["optional-dependencies"][extra]),
    ]
    return [parsed for text in listed if (parsed := Requirement(text)).name != PROJECT["name"]]


def read_pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_the_lowest_versions_are_the_lower_bounds():
    bounds = {}
    for requirement in read_requirements("train", "cli", "app", "stickers", "test"):
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        bounds[canonicalize_name(requirement.name)] = Version(bound)
    assert read_pins("constraints-lowest.txt") == bounds


def test_the_pinned_versions_are_within_the_bounds():
    pins = read_pins("constraints.txt")
    requirements = read_requirements(*PROJECT["optional-dependencies"])
    named = {canonicalize_name(requirement.name): requirement for requirement in requirements}
    outside = [name for name, version in pins.items() if name in named and version not in named[name].specifier]
    assert outside == []


def test_the_supported_versions_of_diffusers_are_those_of_the_tests():
    lowest, pinned = (read_pins(name)["diffusers"] for name in ("constraints-lowest.txt", "constraints.txt"))
    assert tuple(Version(version) for version in SUPPORTED) == (lowest, pinned)


def test_the_workflow_tests_all_versions_of_python():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    tested = yaml.safe_load(text)["jobs"]["tests"]["strategy"]["matrix"]["python"]
    listed = [found[1] for text in PROJECT["classifiers"] if (found := re.search(r":: Python :: (3\.\d+)$", text))]
    assert tested == listed and PROJECT["requires-python"] == f">={tested[0]}"


# ----------------------------------------------------------------------------------------------------------------------
# Workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_only_call_targets_of_the_makefile(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more asks for it
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands
    for command in commands:
        assert (found := re.fullmatch(r"make ([\w-]+)( [A-Z]+=\S+)*", command)), command
        assert found[1] in targets, command
    for action in (step["uses"] for step in steps if "uses" in step):
        assert re.search(r"@(v\d+|release/v\d+)$", action), action


def test_the_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lowest", "release", "tests"]


# ----------------------------------------------------------------------------------------------------------------------
# What `make dist` compares


def test_an_sdist_that_lacks_a_file_or_has_another_one(tmp_path):
    (tmp_path / "a.py").touch()
    sdist = tmp_path / "name-1.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("a.py", "run.log", "PKG-INFO", "setup.cfg", "name.egg-info/SOURCES.txt"):
            archive.add(tmp_path / "a.py", f"name-1/{name}")
    assert compare_sdist(sdist, {"a.py", "run.log"}) == []
    assert compare_sdist(sdist, {"a.py", "b/c.py"}) == [
        "name-1.tar.gz lacks b/c.py: list it in MANIFEST.in.",
        "name-1.tar.gz has run.log, which git does not track.",
    ]


def test_wheels_that_differ(tmp_path):
    for name, files in (("a", {"x.py": "1", "y.py": "2"}), ("b", {"x.py": "1", "y.py": "3", "z.py": ""})):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            for file, text in files.items():
                archive.writestr(file, text)
    first, second = tmp_path / "a.whl", tmp_path / "b.whl"
    assert compare_wheels(first, first) == []
    assert compare_wheels(first, second) == [
        f"Only one of {first} and {second} has z.py.",
        f"y.py differs between {first} and {second}.",
    ]

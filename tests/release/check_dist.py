# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Check what `make dist` has built: the sdist holds all files of the repository, and its wheel is the one that the repository
itself makes.
"""

import argparse
import subprocess
import tarfile
import zipfile
from pathlib import Path

from diffusers_greedy_grow.version import __version__


ROOT = Path(__file__).parents[2]


def list_tracked() -> set[str]:
    """Return the paths of the files that git tracks, and that are not deleted."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def compare_sdist(sdist: Path, tracked: set[str]) -> list[str]:
    """Return a message for each file that an sdist lacks, or should not have. setuptools adds its metadata."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name} - {"PKG-INFO", "setup.cfg"}
    missing = [f"{sdist.name} lacks {name}: list it in MANIFEST.in." for name in sorted(tracked - names)]
    return missing + [f"{sdist.name} has {name}, which git does not track." for name in sorted(names - tracked)]


def compare_wheels(wheel: Path, other: Path) -> list[str]:
    """Return a message for each file that only one of two wheels has, or that differs between them."""
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(other) as second:
        names, others = set(first.namelist()), set(second.namelist())
        problems = [f"Only one of {wheel} and {other} has {name}." for name in sorted(names ^ others)]
        differing = (name for name in sorted(names & others) if first.read(name) != second.read(name))
        return problems + [f"{name} differs between {wheel} and {other}." for name in differing]


def find_one(folder: Path, pattern: str) -> Path:
    paths = list(folder.glob(pattern))
    if len(paths) != 1:
        raise SystemExit(f"{folder} must have one file {pattern}; it has {[path.name for path in paths]}.")
    return paths[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="The folder of the sdist and the wheel that was built from it.")
    parser.add_argument("tree", type=Path, help="The folder of the wheel that was built from the repository.")
    parser.add_argument("tag", nargs="?", help="The tag that is released.")
    args = parser.parse_args()
    problems = compare_sdist(find_one(args.dist, "*.tar.gz"), list_tracked())
    problems += compare_wheels(find_one(args.dist, "*.whl"), find_one(args.tree, "*.whl"))
    if args.tag not in (None, f"v{__version__}"):
        problems.append(f"The tag must be v{__version__}, as in diffusers_greedy_grow/version.py; it is {args.tag}.")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()

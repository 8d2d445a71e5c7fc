# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""What the benchmarks share: tables in Markdown, spreads, and a description of the machine."""

import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import diffusers
import torch


RESULTS = Path(__file__).parent / "results"
if torch.cuda.is_available():
    RESULTS /= "gpu"


def spread(values: list[float], digits: int = 3) -> str:
    """The median, and in brackets the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def mean_and_deviation(values: list[float], digits: int = 3) -> str:
    """The mean and, of more than one, the standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows: list[dict]) -> str:
    if not rows:
        return "Nothing has been run yet."
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def draw_bars(rows: list[dict], panel: str, label: str, value: str, path: Path) -> None:
    """
    A panel for each value of the column `panel`, a bar for each row: the first number in its `value`, and where there are
    more, as [`spread`] writes them, a line from the smallest to the largest.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row[panel] for row in rows))
    height = max(sum(row[panel] == name for row in rows) for name in names)
    size = (6 * len(names), 0.8 + 0.3 * height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names):
        own = [row for row in rows if row[panel] == name]
        for i, row in enumerate(own):
            middle, *ends = (float(number) for number in re.findall(r"[\d.]+", str(row[value])))
            axis.barh(i, middle, color="C0" if i else "C7")
            axis.plot(ends, [i] * len(ends), color="black", linewidth=1)
            axis.annotate(f"{middle:g}", (max([middle, *ends]), i), (4, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(own)), [row[label] for row in own])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * axis.get_xlim()[1])  # room for the numbers
        axis.set_xlabel(value)
        axis.set_title(f"{panel}: {name}")
    figure.savefig(path, dpi=80)


def describe_machine() -> str:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        models = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.processor()
        device = f"{os.cpu_count()} cores of {name}"
    return f"{device}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def describe_commit() -> str | None:
    """That of the code, where it is a git checkout, and whether the code has been changed since."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    return f"{commit}{'-dirty' if changed else ''}" if commit else None


def keep_rows(path: Path, rows: list[dict], column: str, settings: dict) -> list[dict]:
    """
    Writes `rows` to `path`, instead of those there with the same values in `column`, with the `settings` and the machine that
    they are of. Returns all rows there.
    """
    measured = json.loads(path.read_text())["measured"] if path.exists() else []
    again = {row[column] for row in rows}
    for part in measured:
        part["rows"] = [row for row in part["rows"] if row[column] not in again]
    threads = torch.get_num_threads()
    measured.append({"machine": describe_machine(), "threads": threads, "settings": settings, "rows": rows})
    measured = [part for part in measured if part["rows"]]
    write_json(path, {"measured": measured})
    return [row for part in measured for row in part["rows"]]


def write_json(path: Path, content: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)

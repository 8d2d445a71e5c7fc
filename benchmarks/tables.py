# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Code that all benchmarks share: records in JSON, reports in Markdown written from them, bar charts, and a description of
the machine and the commit.

Measurements are written to `<name>.json` in `--results_dir`. The report `<name>.md` beside it is written from that file
alone, so `--report` can write it again at any time, on any machine.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MOST_COLUMNS = 6

Row = dict[str, Any]
Record = dict[str, Any]


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results_dir",
        type=Path,
        default=RESULTS / "gpu" if torch.cuda.is_available() else RESULTS,
        help="The folder of records, reports and plots; `results/`, or `results/gpu/` on a GPU, by default.",
    )
    parser.add_argument(
        "--report", action="store_true", help="Measure nothing; write reports and plots from the records."
    )


def own_results(args: argparse.Namespace) -> Path:
    """Return the folder of results: `results_dir`, or a folder in it for data of one's own."""
    if not getattr(args, "train_data_dir", None):
        return args.results_dir
    data = Path(args.train_data_dir).resolve()
    return args.results_dir / f"{data.stem}-{zlib.crc32(str(data).encode()):08x}"  # many a folder is called "train"


# ----------------------------------------------------------------------------------------------------------------------
# Numbers and tables


def spread(values: list[float], digits: int = 3) -> str:
    """Format the median, and in brackets the smallest and the largest value."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def mean_and_deviation(values: list[float], digits: int = 3) -> str:
    """Format the mean and, for more than one value, the standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows: list[Row]) -> str:
    """Format rows as a Markdown table with the columns of the first row."""
    if not rows:
        return "Nothing has been measured yet."
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def split_columns(rows: list[Row], num_keys: int, most: int = MOST_COLUMNS) -> list[list[Row]]:
    """Split a wide table into tables of at most `most` columns, each with the first `num_keys` columns."""
    names = list(rows[0]) if rows else []
    keys, values = names[:num_keys], names[num_keys:]
    width = most - num_keys
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    return [[{name: row.get(name, "") for name in [*keys, *part]} for row in rows] for part in parts] or [rows]


# ----------------------------------------------------------------------------------------------------------------------
# Records


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or `None` if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: dict | list) -> None:
    """Write a JSON file aside and rename it, so that an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def keep_rows(path: Path, rows: list[Row], column: str, settings: argparse.Namespace) -> list[Row]:
    """
    Add `rows` to the records in `path`, with the machine and the settings of this measurement. Earlier rows with the same
    values in `column` are replaced. Return all rows there.
    """
    measured = (read_json(path) or {"measured": []})["measured"]
    again = {row[column] for row in rows}
    for part in measured:
        part["rows"] = [row for row in part["rows"] if row[column] not in again]
    own = {
        name: show_path(value) if isinstance(value, Path) else value
        for name, value in vars(settings).items()
        if name not in ("report", "results_dir")
    }
    measured.append({"machine": describe_machine(), "threads": torch.get_num_threads(), "settings": own, "rows": rows})
    write_json(path, {"measured": [part for part in measured if part["rows"]]})
    return read_rows(path)


def show_path(path: Path) -> str:
    """Return a path relative to the repository, or as it is outside."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def read_rows(path: Path) -> list[Row]:
    """Return all rows that [`keep_rows`] has written to `path`."""
    return [row for part in (read_json(path) or {"measured": []})["measured"] for row in part["rows"]]


# ----------------------------------------------------------------------------------------------------------------------
# Reports


@dataclass
class Section:
    """One table of a report; the first `num_keys` columns are repeated where a wide table is split."""

    rows: list[Row]
    title: str = ""
    note: str = ""
    num_keys: int = 1


def report_command(benchmark: str, args: argparse.Namespace) -> str:
    """Return the command that writes the reports of a `benchmark` from the records in `args.results_dir`."""
    command = [f"python -m benchmarks.{benchmark}"]
    command += ["--report"] if hasattr(args, "report") else []  # `trials` can do nothing else
    command += ["--results_dir", show_path(own_results(args))]
    command += [f"--{flag}" for flag in ("quick", "large") if getattr(args, flag, False)]
    return " ".join(command)


def render_report(command: str, title: str, sections: Iterable[Section], note: str = "") -> str:
    """Return a report in Markdown. Its first line names the `command` that writes it."""
    parts = [f"<!-- Written by `{command}`; do not edit. -->", f"# {title}", note]
    for section in sections:
        parts += [f"## {section.title}" if section.title else "", section.note]
        parts += [markdown(rows) for rows in split_columns(section.rows, section.num_keys)]
    return "\n\n".join(part for part in parts if part) + "\n"


def measured_sections(path: Path, num_keys: int = 1) -> list[Section]:
    """Return one section per measurement in `path`, as [`keep_rows`] wrote them, with its machine and settings."""
    sections = []
    for part in (read_json(path) or {"measured": []})["measured"]:
        threads = f", {part['threads']} thread{'s' * (part['threads'] > 1)}" if "threads" in part else ""
        note = f"{part['machine']}{threads}."
        given = {name: value for name, value in part.get("settings", {}).items() if value not in (None, False)}
        if given:
            flags = (
                f"--{name}" if value is True else f"--{name} {format_values(value)}" for name, value in given.items()
            )
            note += f" Settings: `{' '.join(flags)}`."
        sections.append(Section(part["rows"], note=note, num_keys=num_keys))
    return sections


def format_values(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(f'"{one}"' if " " in str(one) else str(one) for one in values)


def describe_runs(runs: Iterable[Record]) -> str:
    """Return the machines and precisions that runs trained with, and the number of runs on each."""
    counts = Counter(f"{run['machine']}, mixed precision {run['mixed_precision']}" for run in runs)
    return "; ".join(f"{count} runs on {machine}" for machine, count in counts.most_common())


def write_reports(reports: dict[Path, str]) -> None:
    """Write reports to their files and print them."""
    for path, text in reports.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{text}\nWritten to {path}.")


def draw_bars(rows: list[Row], panel: str, label: str, value: str, path: Path) -> None:
    """
    Draw one panel per value of the column `panel`, and in it one bar per row: the first number in the row's `value`. Where
    there are more numbers, as [`spread`] writes them, a line goes from the smallest to the largest.
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


# ----------------------------------------------------------------------------------------------------------------------
# Machine and commit


def describe_machine() -> str:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        models = [line for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.processor()
        device = f"{os.cpu_count()} cores of {name}"
    return f"{device}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def describe_commit() -> str | None:
    """Return the commit of the code, with `-dirty` if the code has changed since; `None` outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    return f"{commit}{'-dirty' if changed else ''}" if commit else None

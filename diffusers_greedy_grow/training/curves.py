# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Loss curves."""

import json
from pathlib import Path


def draw_losses(metrics_path: str | Path, path: str | Path) -> None:
    """
    Plot the losses in `metrics.jsonl`: per phase by frequency band and, below, by noise level, with held-out losses as dots. All are
    errors of the velocity. Held-out losses use the noise levels of the first phase in all phases, so that phases compare.

    Args:
        metrics_path (`str` or `Path`): The metrics.
        path (`str` or `Path`): The PNG to write.
    """
    from matplotlib.figure import Figure

    phases: dict[str, list[dict]] = {}
    for line in Path(metrics_path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        phases.setdefault(record["phase"], []).append(record)
    if not phases:
        return

    figure = Figure(figsize=(5 * len(phases), 7))
    # Phases share their scale, so that their losses compare. A layout of matplotlib's would take longer than a small phase.
    axes = figure.subplots(2, len(phases), squeeze=False, sharey="row")
    figure.subplots_adjust(left=0.25 / (len(phases) + 1), right=0.98, bottom=0.07, top=0.95, wspace=0.05, hspace=0.1)
    levels = sorted(
        {key for records in phases.values() for record in records for key in record if key.startswith("loss_sigma")}
    )
    for above, below, (phase, records) in zip(*axes, phases.items()):
        for i, (key, label) in enumerate((("loss", "loss"), ("loss_low", "low band"), ("loss_high", "high band"))):
            _draw_curve(above, records, f"C{i}", key, label, f"val_{key}")
        for i, key in enumerate(levels):
            label = "noise " + key.removeprefix("loss_sigma_").replace("_", " to ")
            _draw_curve(below, records, f"C{i}", key, label, f"val_{key}")
        for i, band in enumerate(("low", "high"), start=len(levels)):
            label = f"{band} band, noise 0.02 to 0.3, held out"
            _draw_curve(below, records, f"C{i}", None, label, f"val_low_noise_loss_{band}")
        above.set(title=phase, yscale="log")
        below.set(xlabel="step", yscale="log")
    for row in axes:
        lines = {line.get_label(): line for axis in row for line in axis.lines if not line.get_label().startswith("_")}
        title = "dots: held out, EMA, first phase's levels"
        row[0].legend(lines.values(), lines.keys(), fontsize=7, title_fontsize=7, title=title)
        for axis in row:
            axis.grid(alpha=0.3)
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw_curve(axis, records: list[dict], color: str, key: str | None, label: str, val_key: str) -> None:
    """Plot `key` as a curve and `val_key` as dots, or `val_key` alone as a dotted line."""
    points = [(record["step"], record[key]) for record in records if key in record]
    held_out = [(record["step"], record[val_key]) for record in records if val_key in record]
    if points:
        axis.plot(*zip(*points), label=label, color=color, linewidth=1)
    if held_out:
        style = {} if points else {"label": label, "linestyle": ":"}
        axis.plot(*zip(*held_out), "o", color=color, markersize=4, **style)

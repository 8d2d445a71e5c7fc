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
    axes = figure.subplots(2, len(phases), squeeze=False)
    for above, below, (phase, records) in zip(*axes, phases.items()):
        for key, label in (("loss", "loss"), ("loss_low", "low band"), ("loss_high", "high band")):
            _draw_curve(above, records, key, label, f"val_{key}")
        levels = dict.fromkeys(key for record in records for key in record if key.startswith("loss_sigma"))
        for key in sorted(levels):
            _draw_curve(
                below, records, key, "noise " + key.removeprefix("loss_sigma_").replace("_", " to "), f"val_{key}"
            )
        for band in ("low", "high"):
            _draw_curve(
                below, records, None, f"{band} band, noise 0.02 to 0.3, held out", f"val_low_noise_loss_{band}"
            )
        above.set(title=phase, yscale="log")
        below.set(xlabel="step", yscale="log")
        for axis in (above, below):
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7, title_fontsize=7, title="dots: held out, EMA, first phase's levels")
    figure.tight_layout()
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw_curve(axis, records: list[dict], key: str | None, label: str, val_key: str) -> None:
    """Plot `key` as a curve and `val_key` as dots in its color, or `val_key` alone as a dotted line."""
    points = [(record["step"], record[key]) for record in records if key in record]
    held_out = [(record["step"], record[val_key]) for record in records if val_key in record]
    color = axis.plot(*zip(*points), label=label, linewidth=1)[0].get_color() if points else None
    if held_out:
        style = {"color": color} if points else {"label": label, "linestyle": ":"}
        axis.plot(*zip(*held_out), "o", markersize=4, **style)

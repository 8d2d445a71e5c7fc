# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What made the difference? Writes the report of the trials in `results/trials.json`: single runs by hand of models and
options that the code no longer has. There is nothing to run again.

    python -m benchmarks.trials
"""

import argparse
from pathlib import Path

from benchmarks.tables import (
    RESULTS,
    Record,
    Row,
    Section,
    read_json,
    render_report,
    report_command,
    write_reports,
)


NOTE = """
Trials by hand, one run each, of earlier versions of the model and its recipe. Compare rows with others of the same core
and operations only. Losses, shares and distances are explained in [grow_vs_scratch.md](grow_vs_scratch.md). Empty cells
were not measured. *x8* and *x4* in a name: 16 -> 128 px and 16 -> 64 px.
""".strip()


def loss_row(trial: Record) -> Row:
    last = trial["curve"][-1]
    columns = {"loss": "val_loss", "low band": "val_loss_low", "high band": "val_loss_high"}
    low_noise = last.get("val_low_noise_loss")
    return {
        "trial": trial["trial"],
        "steps": last.get("step", ""),
        **{label: f"{last[name]:.4f}" if name in last else "" for label, name in columns.items()},
        "loss at noise .02-.3": "" if low_noise is None else f"{low_noise:.2f}",
    }


def image_row(trial: Record) -> Row:
    scores = list(trial["scores"].values())[-1]
    return {
        "trial": trial["trial"],
        **{f"{name}s": f"{scores[name]:.2f}" for name in ("shape", "texture")},
        "SWD 128 / 64 / 32 / 16": " / ".join(f"{scores[f'swd_{size}']:.0f}" for size in (128, 64, 32, 16)),
    }


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    trials = read_json(args.results_dir / "trials.json") or []
    scored = [trial for trial in trials if "scores" in trial]
    machines = "; ".join(sorted({trial["machine"] for trial in scored}))
    sections = [
        Section([loss_row(trial) for trial in trials], "Held-out loss at the last step"),
        Section([image_row(trial) for trial in scored], "Images", f"Trained on {machines}."),
    ]
    title = "What made the difference? Trials"
    return {args.results_dir / "trials.md": render_report(report_command("trials", args), title, sections, NOTE)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    write_reports(make_reports(parse_arguments(argv)))


if __name__ == "__main__":
    main()

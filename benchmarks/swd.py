# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Sliced Wasserstein distance between two sets of images, per level of the Laplacian pyramid, after Karras et al. (2018).
It is adapted to small sets: the pyramid is that of growing (pooling and repeating), both sets are scaled by the real set's
deviation, and there are fewer patches and directions than in the paper. Its values compare with each other only.

    python -m benchmarks.swd benchmarks/runs/shapes-128px-20000 --resolution 128    # what the distances see
    python -m benchmarks.swd --report                                               # the report from the records
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.tables import (
    Row,
    add_report_arguments,
    keep_rows,
    measured_sections,
    render_report,
    report_command,
    write_reports,
)
from diffusers_greedy_grow.flow import pool, upsample
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.sources import load_captioned_data


NOTE = """
Held-out images compared with themselves, with other real images, and with themselves as a generator might miss
them. *SWD n*: distance at the pyramid level of n px, in thousandths of the real images' standard deviation.
""".strip()


def laplacian_pyramid(images: torch.Tensor, min_size: int = 16) -> dict[int, torch.Tensor]:
    """Return, by resolution, what each level adds to the next smaller one, and the smallest level itself."""
    levels = {}
    while images.shape[-1] > min_size:
        smaller = pool(images, 2)
        levels[images.shape[-1]] = images - upsample(smaller, 2)
        images = smaller
    levels[images.shape[-1]] = images
    return levels


def sample_patches(level: torch.Tensor, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` random patches per image, flattened: `(B * count, C * size * size)`."""
    unfolded = F.unfold(level, size).transpose(1, 2)  # (B, positions, C * size * size)
    positions = torch.randint(unfolded.shape[1], (len(level), count), generator=generator)
    return unfolded.gather(1, positions.unsqueeze(-1).expand(-1, -1, unfolded.shape[-1])).flatten(0, 1)


def sliced_wasserstein(
    images: torch.Tensor, real: torch.Tensor, num_patches: int = 64, patch_size: int = 7, num_directions: int = 256
) -> dict[int, float]:
    """
    Args:
        images (`torch.Tensor` of shape `(B, C, R, R)`), real (the same shape): Images in [0, 1].

    Returns:
        For each level's resolution, the mean distance of the patches' projections, times 1000, as published; in units of
        the real patches' standard deviation.
    """
    if images.shape != real.shape:
        raise ValueError(f"`images` {tuple(images.shape)} and `real` {tuple(real.shape)} must be of one shape.")
    generator = torch.Generator().manual_seed(0)
    distances = {}
    for (size, level), real_level in zip(laplacian_pyramid(images).items(), laplacian_pyramid(real).values()):
        mean = real_level.mean(dim=(0, 2, 3), keepdim=True)
        std = real_level.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-4)
        ours, theirs = (
            sample_patches((band - mean) / std, num_patches, patch_size, generator) for band in (level, real_level)
        )
        directions = torch.randn(ours.shape[1], num_directions, generator=generator)
        directions = directions / directions.norm(dim=0)
        difference = (ours @ directions).sort(dim=0).values - (theirs @ directions).sort(dim=0).values
        distances[size] = 1000 * difference.abs().mean().item()
    return distances


def measure(data_folder: str, resolution: int, num_images: int) -> list[Row]:
    """Return one row per set of images."""
    real, other = (
        torch.stack([CaptionedImages(rows, resolution)[i]["pixel_values"] for i in range(num_images)]) / 255
        for rows in reversed(load_captioned_data(None, data_folder, "image", "text"))
    )
    grainy = real + 0.01 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "the same": real,
        "other real images": other,
        "the same, pooled by 4": upsample(pool(real, 4), 4),
        "the same, with noise of .01": grainy,
    }
    rows = []
    for name, images in sets.items():
        distances = sliced_wasserstein(images, real)
        rows.append({"images": name, **{f"SWD {size}": f"{x:.0f}" for size, x in distances.items()}})
    return rows


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    sections = measured_sections(args.results_dir / "swd.json")
    title = "What do the distances see? Full tables"
    return {args.results_dir / "swd.md": render_report(report_command("swd", args), title, sections, NOTE)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("data_folder", nargs="?", help="A folder of captioned images; required unless `--report`.")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--num_images", type=int, default=96)
    args = parser.parse_args(argv)
    if not (args.report or args.data_folder):
        parser.error("`data_folder` is required unless `--report` is given.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not args.report:
        rows = measure(args.data_folder, args.resolution, args.num_images)
        keep_rows(args.results_dir / "swd.json", rows, "images", args)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()

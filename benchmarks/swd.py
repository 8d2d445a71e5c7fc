# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Sliced Wasserstein distance between two sets of images, per level of the Laplacian pyramid, after Karras et al. (2018).
For small sets: the pyramid is the growth law's own (pooling and repeating), both sets are scaled by the true one's
deviation, and there are fewer patches and directions than in the paper. So values compare with each other and no others.

    python -m benchmarks.swd benchmarks/runs/shapes-128px-20000 --resolution 128    # how far true images are apart
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.tables import RESULTS, describe_machine, markdown, write_json
from diffusers_greedy_grow.flow import pool, upsample
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.sources import load_captioned_data


def laplacian_pyramid(images: torch.Tensor, min_size: int = 16) -> dict[int, torch.Tensor]:
    """By resolution, what each level adds to the next smaller one; the smallest is what is left."""
    levels = {}
    while images.shape[-1] > min_size:
        smaller = pool(images, 2)
        levels[images.shape[-1]] = images - upsample(smaller, 2)
        images = smaller
    levels[images.shape[-1]] = images
    return levels


def patches(level: torch.Tensor, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random patches of each image, flattened: `(B * count, C * size * size)`."""
    unfolded = F.unfold(level, size).transpose(1, 2)  # (B, places, C * size * size)
    places = torch.randint(unfolded.shape[1], (len(level), count), generator=generator)
    return unfolded.gather(1, places.unsqueeze(-1).expand(-1, -1, unfolded.shape[-1])).flatten(0, 1)


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
            patches((band - mean) / std, num_patches, patch_size, generator) for band in (level, real_level)
        )
        directions = torch.randn(ours.shape[1], num_directions, generator=generator)
        directions = directions / directions.norm(dim=0)
        difference = (ours @ directions).sort(dim=0).values - (theirs @ directions).sort(dim=0).values
        distances[size] = 1000 * difference.abs().mean().item()
    return distances


def main() -> None:
    """Held-out images against as many true ones, and against themselves as a generator might miss them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("data_folder")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--num_images", type=int, default=96)
    args = parser.parse_args()
    real, other = (
        torch.stack([CaptionedImages(rows, args.resolution)[i]["pixel_values"] for i in range(args.num_images)]) / 255
        for rows in reversed(load_captioned_data(None, args.data_folder, "image", "text"))
    )
    grainy = real + 0.01 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "the same": real,
        "other true ones": other,
        "the same, pooled by 4": upsample(pool(real, 4), 4),
        "the same, with noise of .01": grainy,
    }
    rows = []
    for name, images in sets.items():
        distances = sliced_wasserstein(images, real)
        rows.append({"images": name, **{f"SWD {size}": f"{x:.0f}" for size, x in distances.items()}})
    print(markdown(rows))
    write_json(RESULTS / "swd.json", {"machine": describe_machine(), "rows": rows})


if __name__ == "__main__":
    main()

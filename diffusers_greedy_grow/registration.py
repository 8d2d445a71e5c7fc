# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Makes diffusers find our classes by name. There is no public way to do so; everything that touches its tables is here.

After it, `model_index.json` names the package rather than an inner module, so that moving a file breaks no published
repository, and `DiffusionPipeline`, `AutoModel` and `AutoPipelineForText2Image` load our folders.
"""

import diffusers
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils


# The oldest version that has all that is needed here, and the latest one that was tried.
SUPPORTED = ("0.38", "0.42.1")


def find_table(module, name: str) -> dict:
    """One of diffusers' tables, or an `ImportError` that says which versions have it."""
    table = getattr(module, name, None)
    if not isinstance(table, dict):
        raise ImportError(
            f"diffusers {diffusers.__version__} has no table `{module.__name__}.{name}`, by which it would find the classes "
            f"of diffusers-greedy-grow. Install a version that has: "
            f'`pip install "diffusers>={SUPPORTED[0]},<={SUPPORTED[1]}"`.'
        )
    return table


def register(package: str, models: tuple[type, ...], pipeline: type, pipeline_name: str) -> None:
    """
    Registers model classes and a text-to-image pipeline class. Doing so twice changes nothing.

    Args:
        package (`str`): The top-level package that exports the classes and diffusers' `ModelMixin`.
        models (`tuple[type, ...]`): Model classes.
        pipeline (`type`): The pipeline class.
        pipeline_name (`str`): Its key in the auto pipeline's table, such as `"greedy-grow"`.

    Raises:
        `ImportError`: if the installed diffusers has changed so that it would not find them.
    """
    loadable = find_table(pipeline_loading_utils, "LOADABLE_CLASSES")
    text_to_image = find_table(auto_pipeline, "AUTO_TEXT2IMAGE_PIPELINES_MAPPING")
    for registered in (*models, pipeline):
        setattr(diffusers, registered.__name__, registered)
        setattr(diffusers.pipelines if registered is pipeline else diffusers.models, registered.__name__, registered)
    loadable.setdefault(package, {"ModelMixin": ["save_pretrained", "from_pretrained"]})
    text_to_image[pipeline_name] = pipeline

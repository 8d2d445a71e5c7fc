# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Registration of our classes in diffusers, which has no public interface for it. Only this module touches diffusers' tables.

After registration, `DiffusionPipeline`, `AutoModel`, the auto pipelines and `ModularPipeline` load our folders.
`model_index.json` names the package instead of an inner module, so published repositories still load after a file of the
package has moved.
"""

import diffusers
from diffusers.modular_pipelines import modular_pipeline
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils


# The oldest version that pyproject.toml allows, and the newest one that we have tested.
SUPPORTED = ("0.42", "0.42.1")


def find_table(module, name: str) -> dict:
    """Return one of diffusers' tables; raise an `ImportError` that names the supported versions if it does not exist."""
    table = getattr(module, name, None)
    if not isinstance(table, dict):
        raise ImportError(
            f"diffusers {diffusers.__version__} has no table `{module.__name__}.{name}`, which diffusers-greedy-grow needs to "
            "register its classes. Install a version that has it: "
            f'`pip install "diffusers>={SUPPORTED[0]},<={SUPPORTED[1]}"`.'
        )
    return table


def register(
    package: str,
    models: tuple[type, ...],
    pipelines: dict[str | None, type],
    modular: tuple[type, type],
    pipeline_name: str,
) -> None:
    """
    Register model and pipeline classes. A second call changes nothing.

    Args:
        package (`str`): The top-level package that exports the classes and diffusers' `ModelMixin`.
        models (`tuple[type, ...]`): The model classes.
        pipelines (`dict`): The pipeline classes by diffusers' table of auto pipelines that each belongs to, or None.
        modular (`tuple[type, type]`): The class of the modular pipeline, and that of its blocks.
        pipeline_name (`str`): The pipelines' key in these tables, such as `"greedy-grow"`.

    Raises:
        `ImportError`: if the installed diffusers lacks one of the tables.
    """
    loadable = find_table(pipeline_loading_utils, "LOADABLE_CLASSES")
    tables = {name: find_table(auto_pipeline, name) for name in pipelines if name is not None}
    modular_names = find_table(modular_pipeline, "MODULAR_PIPELINE_MAPPING")
    places = (
        (diffusers.models, models),
        (diffusers.pipelines, pipelines.values()),
        (diffusers.modular_pipelines, modular),
    )
    for module, classes in places:
        for registered in classes:
            setattr(diffusers, registered.__name__, registered)
            setattr(module, registered.__name__, registered)
    loadable.setdefault(package, {"ModelMixin": ["save_pretrained", "from_pretrained"]})
    for name, table in tables.items():
        table[pipeline_name] = pipelines[name]
    # Without a `modular_model_index.json`, diffusers finds the modular pipeline by the name of the classic one's table.
    modular_names.setdefault(pipeline_name, lambda config_dict=None: modular[0].__name__)

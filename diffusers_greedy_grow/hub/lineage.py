# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
The lineage of a model: the growths and training phases that produced its weights, oldest first.

It is a list of entries in the model's configuration and therefore travels with the weights. An entry is a growth
(`{"grown_to": 256, ...}`) or a training phase (`{"phase": "grown-256-detail", ...}`).
"""

import re
from pathlib import Path
from typing import Any


def get_lineage(model) -> list[dict[str, Any]]:
    """Return the lineage of a model, oldest entry first."""
    return list(model.config.get("_lineage", []))


def find_source(model) -> dict[str, str]:
    """
    Return the repository that a model was loaded from as `core`, and its commit, if known, as `core_revision`; return an
    empty dictionary for a model from a local folder.
    """
    name = str(model.config.get("_name_or_path", ""))
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})", name):
        return {"core": f"{cached[1]}/{cached[2]}", "core_revision": cached[3]}
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or Path(name).exists():
        return {}
    revision = getattr(model, "_commit_hash", None)
    return {"core": name} | ({"core_revision": revision} if revision else {})


def add_to_lineage(model, **entry: Any) -> None:
    """
    Append an entry to a model's lineage. Its values must be serializable as JSON. An entry with the `phase` of the last one
    replaces it.
    """
    lineage = get_lineage(model)
    if "phase" in entry and lineage and lineage[-1].get("phase") == entry["phase"]:
        lineage.pop()
    model.register_to_config(_lineage=[*lineage, entry])

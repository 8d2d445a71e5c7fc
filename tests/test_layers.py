# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Imports inside the package point downwards, and no modules import each other in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "diffusers_greedy_grow"
# From the bottom to the top. "" is the package's own `__init__`, which exports the models and the pipeline.
LAYERS = ["version", "flow", "hub", "models", "pipelines", "registration", "", "training"]
HUB_LAYERS = ["hub.lineage", "hub.weights", "hub.references", "hub.upload", "hub.cards", "hub.publish", "hub.mixins"]
HUB_FOR_MODELS = {"hub.lineage", "hub.weights", "hub.references", "hub.mixins"}
TRAINING_PARTS = ["training.shapes", "training.data", "training.text"]
OUTSIDE = {"training_examples", "benchmarks", "tests"}


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def find_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Find all imports below a node, those in functions too, but not those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from find_imports(ast.Module(child.orelse, []))
        else:
            yield from find_imports(child)


def read_imports(package: Path) -> tuple[dict[str, set[str]], list[str]]:
    """
    Read the imports of all files of a package.

    Returns:
        For each module, such as `"training.loop"`, the modules of the package that it imports; and a message for each import
        of [`OUTSIDE`].
    """
    names = {path: path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")}
    modules = {path: ".".join(parts[1:]).removesuffix("__init__").rstrip(".") for path, parts in names.items()}
    imports: dict[str, set[str]] = {module: set() for module in modules.values()}
    problems = []
    for path, module in modules.items():
        for node in find_imports(ast.parse(path.read_text())):
            targets = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                base = names[path][: -node.level] if node.level else ()
                source = ".".join([*base, *filter(None, [node.module])])
                targets = [f"{source}.{target}" for target in targets]
            for target in targets:
                top, _, rest = target.partition(".")
                if top in OUTSIDE:
                    problems.append(f"{module} imports {target}, which is not in the package")
                elif top == package.name:  # the last part is a module, or a name in the module before it
                    imports[module].add(rest if rest in imports else rest.rpartition(".")[0])
    return imports, problems


def reach(module: str, imports: dict[str, set[str]]) -> set[str]:
    """Return a module and all that it imports, directly or through others."""
    reached, waiting = set(), [module]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imports[module]
    return reached


def find_broken_rule(module: str, target: str, imports: dict[str, set[str]]) -> str | None:
    """Say why a module must not import another one, or return `None`."""
    if LAYERS.index(module.split(".")[0]) < LAYERS.index(target.split(".")[0]):
        return "it is above it"
    if is_in(module, "models") and is_in(target, "hub") and target not in HUB_FOR_MODELS:
        return f"models import only {sorted(HUB_FOR_MODELS)} of hub"
    if {module, target} <= {*HUB_LAYERS} and HUB_LAYERS.index(module) < HUB_LAYERS.index(target):
        return "it is above it in hub"
    for i, part in enumerate(TRAINING_PARTS):
        if is_in(module, part) and is_in(target, "training") and not is_in(target, part):
            if any(is_in(reached, *TRAINING_PARTS[i:]) for reached in reach(target, imports)):
                return f"{part} imports only sub-packages below it, and modules of training that import no others"
    return None


def find_problems(package: Path) -> list[str]:
    """List all imports that break a rule, and a cycle if there is one."""
    imports, problems = read_imports(package)
    if unknown := [module for module in imports if module.split(".")[0] not in LAYERS]:
        return [f"{module} is in no layer: add it to LAYERS" for module in unknown]
    for module, targets in imports.items():
        for target in sorted(targets):
            if rule := find_broken_rule(module, target, imports):
                problems.append(f"{module or package.name} imports {target or package.name}: {rule}")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        problems.append(f"import cycle: {' -> '.join(error.args[1])}")
    return problems


def test_imports_point_downwards():
    assert len(list(PACKAGE.rglob("*.py"))) > 40
    assert find_problems(PACKAGE) == []


def test_all_parts_of_hub_are_ordered():
    assert {f"hub.{path.stem}" for path in PACKAGE.glob("hub/*.py")} == {*HUB_LAYERS, "hub.__init__"}


@pytest.mark.parametrize(
    "path,code,problem",
    [
        ("flow.py", "from .hub import lineage", "flow imports hub.lineage: it is above it"),
        ("hub/cards.py", "from ..models import blocks", "hub.cards imports models.blocks: it is above it"),
        ("models/blocks.py", "def f():\n    import package", "models.blocks imports package: it is above it"),
        ("pipelines/lora.py", "from package.training.loop import f", "pipelines.lora imports training.loop: it is above it"),
        ("__init__.py", "from .training import loop", "package imports training.loop: it is above it"),
        ("models/blocks.py", "from ..hub.upload import f", "models.blocks imports hub.upload: models import only"),
        ("models/blocks.py", "from .. import hub", "models.blocks imports hub: models import only"),
        ("hub/upload.py", "from .publish import f", "hub.upload imports hub.publish: it is above it in hub"),
        ("training/data/rows.py", "from ..loop import f", "training.data.rows imports training.loop: training.data imports only"),
        ("training/data/rows.py", "from ..text import captions", "training.data.rows imports training.text.captions: "),
        ("models/unet.py", "from .blocks import f\n", None),
        ("training/data/rows.py", "from ..seeds import f\nfrom .images import f\nfrom ...flow import f", None),
        ("flow.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .models import blocks", None),
        ("training/seeds.py", "from .guard import f", "import cycle: training."),
        ("training/loop.py", "from benchmarks.tables import f", "training.loop imports benchmarks.tables.f, which is not in"),
        ("cli.py", "", "cli is in no layer"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_found(path, code, problem, tmp_path):
    package = tmp_path / "package"
    for name in (
        "__init__", "flow", "hub/__init__", "hub/lineage", "hub/upload", "hub/cards", "hub/publish", "hub/mixins",
        "models/__init__", "models/blocks", "pipelines/__init__", "pipelines/lora", "training/__init__", "training/guard",
        "training/data/__init__", "training/data/rows", "training/data/images", "training/text/__init__",
        "training/text/captions", "training/loop", "training/seeds",
    ):  # fmt: skip
        (package / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").touch()
    (package / "training" / "guard.py").write_text("from . import seeds\n")
    (package / "training" / "loop.py").write_text("from .text.captions import f\n")
    assert find_problems(package) == []
    (package / path).write_text(code)
    problems = find_problems(package)
    assert len(problems) == (problem is not None) and all(found.startswith(problem) for found in problems), problems

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rooms of the package: what each may import, and what the package as a whole offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lsst.meas.vaedeblend
import pytest

PACKAGE = "lsst.meas.vaedeblend"
ROOT = Path(lsst.meas.vaedeblend.__file__).parent

MODELS = {"rendering", "sources"}
BELOW_OUTPUT = {"ground", "scene", "network", *MODELS, "inference"}
OUTPUT = {"catalog", "posterior", "redistribution"}
CORE = {*BELOW_OUTPUT, "deblender", *OUTPUT}

MAY_IMPORT: dict[str, set[str]] = {
    "ground": set(),
    "scene": {"ground"},
    "network": {"ground"},
    "rendering": {"ground", "scene", "network", "inference"},
    "sources": {"ground", "scene", "network", "inference", "rendering"},
    # Arrays in, arrays out: no knowledge of scenes, sources and procedure.
    "inference": {"ground", "network"},
    "deblender": BELOW_OUTPUT,
    **dict.fromkeys(OUTPUT, BELOW_OUTPUT),
    "adapters": CORE,
    # One of the tasks compares deblenders.
    "tasks": {*CORE, "adapters", "evaluation"},
    "simulation": {"ground", "scene"},
    "training": {"ground", "scene", "network", "simulation"},
    "evaluation": {*CORE, "adapters", "simulation"},
    "artefacts": set(),
    "plots": {*CORE, "evaluation"},
    "images": {*CORE, "adapters", "plots"},
    "demo": {*CORE, "adapters", "simulation", "evaluation"},
    "cli": {*CORE, "adapters", "simulation", "training", "evaluation", "demo", "images"},
    # What `lsst.meas.vaedeblend` itself offers.
    "": {*CORE, "adapters", "plots"},
}
"""Room to the rooms that it may import, besides itself."""

ONLY_IN: dict[str, set[str]] = {
    **dict.fromkeys(("torch", "lightning", "onnx", "onnxscript"), {"training"}),
    **dict.fromkeys(("galsim", "surveycodex", "speclite"), {"simulation", "training", "evaluation", "demo"}),
    "photutils": {"simulation", "evaluation"},
    "sep": {"evaluation"},
    "matplotlib": {"evaluation", "demo", "plots"},
    "numba": {"ground", "adapters", *MODELS, "inference", "deblender"},
    "threadpoolctl": {"deblender"},
    **dict.fromkeys(("lsst.afw", "lsst.meas.base", "lsst.cell_coadds", "lsst.geom"), {"adapters", "tasks"}),
}
"""Package to the rooms that may import it."""

GROUND_NEEDS = {"numpy", "scipy", "numba"}

MODULES = sorted(ROOT.rglob("*.py"))


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, at any depth but those for type checkers alone, which import nothing when run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from _statements(child)


def _imports(path: Path) -> set[str]:
    """Full names of the modules, or of names in modules, that a file imports."""
    package = [*PACKAGE.split("."), *path.relative_to(ROOT).parent.parts]
    found = set()
    for statement in _statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        base = package[: len(package) + 1 - statement.level] if statement.level else []
        base = [*base, *(statement.module or "").split(".")] if statement.module else base
        found |= {".".join([*base, alias.name]) for alias in statement.names}
    return found


def _room(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").parts[0]
    return "" if name == "__init__" else name


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_arrows_between_rooms_point_down(path):
    if _room(path) == "version":
        pytest.skip("scons wrote it")
    allowed = {_room(path), *MAY_IMPORT[_room(path)]}
    for name in _imports(path):
        if _inside(name, PACKAGE):
            room = name.removeprefix(PACKAGE).lstrip(".").split(".")[0]
            assert room in allowed, f"{_room(path)} may import {sorted(allowed)}, not {name}"
        for package, rooms in ONLY_IN.items():
            assert not _inside(name, package) or _room(path) in rooms, f"{package} is for {sorted(rooms)}"
        if _room(path) == "ground" and not _inside(name, PACKAGE):
            top = name.split(".")[0]
            assert top in GROUND_NEEDS or top in sys.stdlib_module_names, f"the ground needs no {top}"


def test_the_table_has_no_circles():
    """Rooms that the table lets import each other would be one room."""
    order: list[str] = []
    left = {room: set(below) - {room} for room, below in MAY_IMPORT.items()}
    while left:
        free = [room for room, below in left.items() if not below & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        order += free
        left = {room: below for room, below in left.items() if room not in free}
    assert order[0] in ("ground", "artefacts")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_simulation_and_evaluation_run_where_no_torch_is_installed():
    """Not even by way of another package."""
    modules = [
        ".".join([PACKAGE, *path.relative_to(ROOT).with_suffix("").parts])
        for path in MODULES
        if _room(path) in ("simulation", "evaluation", "demo", "cli") and path.name != "__init__.py"
    ]
    code = f"""
import importlib, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "lightning", "onnx", "onnxscript"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
for module in {modules!r}:
    importlib.import_module(module)
print(sorted(m for m in sys.modules if m.startswith("{PACKAGE}.training")))
"""
    assert _run(code) == "[]"


def test_the_package_offers_what_a_user_needs():
    code = f"""
import sys
import {PACKAGE} as package
assert not [m for m in sys.modules if m.startswith("{PACKAGE}.") or m == "numpy"], "loaded before use"
import {PACKAGE}.redistribution, {PACKAGE}.deblender
from {PACKAGE} import *
assert callable(redistribute) and callable(deblend) and callable(load_network) and callable(object_table)
assert package.Scene is Scene and set(package.__all__) <= set(dir(package))
assert DeblendConfig().refinementSteps > 0 and {{PsfGrid, Parent, DeblendResult}} and callable(find_parents)
print(__version__)
"""
    assert _run(code)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'deblendd'"):
        _ = lsst.meas.vaedeblend.deblendd


def test_types_are_for_users_too():
    assert (ROOT / "py.typed").is_file()

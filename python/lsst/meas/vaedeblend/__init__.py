# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deblending of galaxies on multi-band coadds with variational autoencoders.

What a user needs is here; modules are loaded when one of their names is first used, so that importing a part
of the package does not import all of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.fits_images import read_images
    from .adapters.stored_stamps import stamps
    from .catalog import object_table
    from .deblender import DeblendConfig, DeblendResult, deblend
    from .ground.detection import detect
    from .network import load_network
    from .plots import plot_blend
    from .redistribution import redistribute
    from .scene import Parent, PsfGrid, Scene, find_parents

    __version__: str

__all__ = [
    "DeblendConfig",
    "DeblendResult",
    "Parent",
    "PsfGrid",
    "Scene",
    "__version__",
    "deblend",
    "detect",
    "find_parents",
    "load_network",
    "object_table",
    "plot_blend",
    "read_images",
    "redistribute",
    "stamps",
]

_HOMES = {
    "DeblendConfig": "deblender",
    "DeblendResult": "deblender",
    "Parent": "scene",
    "PsfGrid": "scene",
    "Scene": "scene",
    "deblend": "deblender",
    "detect": "ground.detection",
    "find_parents": "scene",
    "load_network": "network",
    "object_table": "catalog",
    "plot_blend": "plots",
    "read_images": "adapters.fits_images",
    "redistribute": "redistribution",
    "stamps": "adapters.stored_stamps",
}
"""Name to the module that has it."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Version of the installed distribution; in a stack, which may have none, that which scons wrote."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meas_vaedeblend")
    except PackageNotFoundError:
        pass
    try:
        return importlib.import_module(".version", __name__).__version__
    except ImportError:
        return "0+unknown"

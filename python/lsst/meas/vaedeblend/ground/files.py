# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that come with the package and are no code: pipelines, configurations, examples for BPS."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped_file", "shipped_files"]

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("bps", "config", "pipelines")
_SUFFIXES = (".md", ".py", ".yaml")


def shipped_files() -> list[str]:
    """List the files that come with the package.

    Returns
    -------
    names : `list` [`str`]
        Names that `shipped_file` takes, such as ``pipelines/deblend.yaml``, sorted.
    """
    names = []
    for folder in _FOLDERS:
        # In a checkout the folders are links to those at its top, which rglob does not follow by itself.
        top = (_PACKAGE / folder).resolve()
        found = (path for path in top.rglob("*") if path.suffix in _SUFFIXES)
        names += [f"{folder}/{path.relative_to(top).as_posix()}" for path in found]
    return sorted(names)


def shipped_file(name: str = "") -> Path:
    """Find a file or folder that comes with the package.

    Parameters
    ----------
    name : `str`, optional
        Its name below the package, such as ``pipelines/deblend.yaml`` or ``config/training``; without one,
        the folder that has them all, which may be ``$MEAS_VAEDEBLEND_DIR``.

    Returns
    -------
    path : `pathlib.Path`
        Where it is.

    Raises
    ------
    FileNotFoundError
        Raised if there is no such file; the message lists those there are.
    """
    parts = Path(name).parts
    path = _PACKAGE.joinpath(*parts)
    if parts and (parts[0] not in _FOLDERS or ".." in parts or not path.exists()):
        raise FileNotFoundError(f"No {name!r} comes with the package, but {', '.join(shipped_files())}.")
    return path

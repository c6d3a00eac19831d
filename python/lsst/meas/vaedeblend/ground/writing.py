# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that are written whole or not at all."""

from __future__ import annotations

__all__ = ["whole_file"]

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under another name, and rename it once it is complete.

    Whoever reads the file, or finds it after an interruption, finds all of it: renaming within a directory
    replaces a file in one step (POSIX rename).

    Parameters
    ----------
    path : path
        The file that is to be.

    Yields
    ------
    part : `pathlib.Path`
        Where to write; removed if the block fails.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

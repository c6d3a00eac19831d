# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Identifiers of objects and parents."""

from __future__ import annotations

__all__ = ["PatchIds"]

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class PatchIds:
    """Signed 64-bit identifiers that are unique over a sky map and the same in every run.

    From the highest bit: one zero (the sign), `TRACT_BITS` for the tract, `PATCH_BITS` for the patch, one
    that is set for parents, and `COUNTER_BITS` for a counter that starts from one in every patch. So no
    identifier is zero, which tables of the pipelines take for "none", and an identifier tells by itself what
    it belongs to.

    Parameters
    ----------
    tract, patch : `int`
        The patch.

    Raises
    ------
    ValueError
        Raised when a number does not fit into its bits.
    """

    tract: int
    patch: int

    TRACT_BITS = 22
    PATCH_BITS = 16
    COUNTER_BITS = 24

    def __post_init__(self) -> None:
        for name, bits in (("tract", self.TRACT_BITS), ("patch", self.PATCH_BITS)):
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ValueError(f"The {name} {value} is not in [0, {1 << bits}).")

    def objects(self, n: int) -> NDArray[np.int64]:
        """Return the identifiers of the first n objects of the patch, (n,)."""
        return self._sequence(n, 0)

    def parents(self, n: int) -> NDArray[np.int64]:
        """Return the identifiers of the first n parents of the patch, (n,)."""
        return self._sequence(n, 1)

    def _sequence(self, n: int, kind: int) -> NDArray[np.int64]:
        if not 0 <= n < 1 << self.COUNTER_BITS:
            raise ValueError(f"{n} rows in a patch are more than {(1 << self.COUNTER_BITS) - 1}.")
        base = (self.tract << self.PATCH_BITS | self.patch) << 1 | kind
        return (base << self.COUNTER_BITS) + np.arange(1, n + 1, dtype=np.int64)

    @classmethod
    def split(cls, identifier: int) -> tuple[int, int, bool, int]:
        """Take an identifier apart into tract, patch, whether it is a parent's, and counter."""
        identifier = int(identifier)
        counter = identifier & (1 << cls.COUNTER_BITS) - 1
        kind = identifier >> cls.COUNTER_BITS & 1
        patch = identifier >> cls.COUNTER_BITS + 1 & (1 << cls.PATCH_BITS) - 1
        return identifier >> cls.COUNTER_BITS + 1 + cls.PATCH_BITS, patch, bool(kind), counter

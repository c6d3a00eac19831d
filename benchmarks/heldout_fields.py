# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Crowded fields of our own, in the format that `vaedeblend evaluate fields` reads, to develop on.

usage: python benchmarks/heldout_fields.py OUT [--fields 16] [--seed 77] [--brightest 20] [--distance 0.6 3]
       python benchmarks/heldout_fields.py OUT --sky [--fields 16] [--seed 77]

With ``--sky`` they look like coadds: stars, saturated cores, large galaxies, correlated noise, sky left over.

What is tuned is tuned on these (`lsst.meas.vaedeblend.simulation.fields` and ``sky_fields``), so that other
benchmarks stay independent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from lsst.meas.vaedeblend.simulation.fields import simulate_field
from lsst.meas.vaedeblend.simulation.sky_fields import simulate_sky_field


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--fields", type=int, default=16)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--brightest", type=float, default=20.0, help="magnitude limit in i")
    parser.add_argument("--distance", type=float, nargs=2, default=(0.6, 3.0), help="of neighbours, arcsec")
    parser.add_argument("--sky", action="store_true", help="fields that look like coadds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.fields):
        path = arguments.out / f"field_{number:02d}.npz"
        if arguments.sky:
            field = simulate_sky_field(arguments.seed, number)
        else:
            field = simulate_field(arguments.seed, number, arguments.brightest, tuple(arguments.distance))
        np.savez_compressed(path, **field)


if __name__ == "__main__":
    main()

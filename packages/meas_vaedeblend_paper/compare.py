# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure packed networks beside the exported ones, on the same images, as `vaedeblend evaluate paper` does.

    python compare.py EXPORTED python/meas_vaedeblend_paper --real-catalogue FILE

Errors of m and of the medians are those of drawing the sample anew; that of the change of m is paired.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from lsst.meas.vaedeblend.evaluation.metrics import shear_bias
from lsst.meas.vaedeblend.evaluation.paper import CASES, PRIORS, _numbers
from lsst.meas.vaedeblend.evaluation.paper_sample import PaperSample, SampleMaker
from lsst.meas.vaedeblend.ground.files import shipped_file
from lsst.meas.vaedeblend.network import Network
from lsst.meas.vaedeblend.simulation.config import load_config

SAMPLES = [
    ("arcelin2020_lsst_euclid", ("arcelin2020_lsst", "arcelin2020_lsst_euclid"), {}),
    ("arcelin2020_lsst_euclid", tuple(PRIORS.values()), {"isolated": True}),
    ("arcelin2020_decentred_uniform", ("arcelin2020_decentred_uniform",), {}),
    ("arcelin2020_decentred_peaks", ("arcelin2020_decentred_peaks",), {}),
    (CASES["transfer"].config, ("arcelin2020_lsst_euclid", "arcelin2020_transfer"), {"real": True}),
]
"""Configuration of a sample, the networks that are measured on it, and whether it is of a special kind."""


def change_of_m(sample: PaperSample, old: str, new: str, repeats: int = 100) -> float:
    """Bootstrap error of the difference of two networks' m on the same images."""
    rng, differences = np.random.default_rng(2), []
    one, two = sample.outputs[old].shape, sample.outputs[new].shape
    for _ in range(repeats):
        rows = rng.integers(0, len(one), len(one))
        found = [shear_bias(sample.shape[rows], s[rows], rng, repeats=2).mean for s in (one, two)]
        differences.append(found[1] - found[0])
    return float(np.std(differences))


def numbers_of(sample: PaperSample, network: str) -> dict[str, float]:
    """Numbers of the report; NaN where a sample is too small for one."""
    numbers = _numbers(sample, network, np.random.default_rng(1))
    return {key: np.nan if value is None else value for key, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exported", type=Path, help="folder of the exported networks")
    parser.add_argument("packed", type=Path, help="folder of this distribution's files")
    parser.add_argument("--samples", type=int, default=1200, help="images of each sample")
    parser.add_argument("--galaxies", type=int, default=150, help="galaxies of which they are made")
    parser.add_argument("--real-catalogue", help="file of a galsim.RealGalaxyCatalog")
    arguments = parser.parse_args()
    print("| network | m exported | m packed | change | e median | mag median |\n|---|---|---|---|---|---|")
    for name, networks, kind in SAMPLES:
        config = load_config(shipped_file(f"config/training/{name}.py"))
        if kind.get("real"):
            if arguments.real_catalogue is None:
                continue
            config.population.real_catalogue = arguments.real_catalogue
        maker = SampleMaker(config, arguments.galaxies, real=kind.get("real", False))
        folders = {"old": arguments.exported, "new": arguments.packed}
        pairs = {
            f"{n} {age}": Network.load(f / f"{n}.onnx", threads=1)
            for n in networks
            for age, f in folders.items()
        }
        sample = maker.run(pairs, arguments.samples, isolated=kind.get("isolated", False))
        for n in networks:
            old, new = (numbers_of(sample, f"{n} {age}") for age in folders)
            error = change_of_m(sample, f"{n} old", f"{n} new")
            cells = [
                n + (", real" if kind.get("real") else ""),
                f"{old['m']:.4f} ± {old['m_err']:.4f}",
                f"{new['m']:.4f}",
                f"{new['m'] - old['m']:+.4f} ± {error:.4f}",
                *(
                    f"{old[k]:.4f} ± {old[k + '_err']:.4f}, {new[k]:.4f}"
                    for k in ("e_median_max", "mag_median_max")
                ),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""One pass of networks on the held-out blends of a training configuration, as cards have it, side by side.

usage: python benchmarks/encoder_alone.py CONFIG DATA NETWORK [NETWORK ...] [--plain] [--samples 2048]

DATA holds the banks of `vaedeblend simulate CONFIG DATA`. With --plain the scenes are the default ones,
without what the configuration adds to them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lsst.meas.vaedeblend.network import load_network
from lsst.meas.vaedeblend.simulation.config import SceneConfig, load_config
from lsst.meas.vaedeblend.training.export import figures_of_merit
from lsst.meas.vaedeblend.training.fit import SceneData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("network", nargs="+")
    parser.add_argument("--plain", action="store_true", help="default scenes")
    parser.add_argument("--samples", type=int, default=2048)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if arguments.plain:
        config.scene = SceneConfig()
    scenes = SceneData(config, arguments.data, "deblender", workers=0)
    for name in arguments.network:
        figures = figures_of_merit(load_network(name, threads=1), scenes, config, arguments.samples)
        print(name, *(f"{key} {value:.4g}" for key, value in figures.items() if not isinstance(value, str)))


if __name__ == "__main__":
    main()

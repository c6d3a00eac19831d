# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""How ellipticities of the paper's networks depend on signal-to-noise: m, and the median error of |e|.

usage: python benchmarks/shape_bias.py CONFIG DATA WEIGHTS [--isolated] [--samples 3000]

The validation sample's blends (or isolated galaxies, for a prior), KSB ellipticities in r with the PSF that
is known. WEIGHTS is a checkpoint, an ONNX file that was exported, or the name of a network that ships.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from lsst.meas.vaedeblend.evaluation.metrics import shear_bias
from lsst.meas.vaedeblend.ground.bands import reference_band
from lsst.meas.vaedeblend.simulation.blends import psf_stamp
from lsst.meas.vaedeblend.simulation.config import load_config
from lsst.meas.vaedeblend.simulation.ksb import ksb_shape
from lsst.meas.vaedeblend.simulation.scenes import squared_snr
from lsst.meas.vaedeblend.training.fit import SceneData, VaeModule
from lsst.meas.vaedeblend.training.weights import load_weights

EDGES = 10.0, 18.0, 30.0, 60.0, 120.0, 300.0, np.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--isolated", action="store_true")
    parser.add_argument("--samples", type=int, default=3000)
    arguments = parser.parse_args()

    config = load_config(arguments.config)
    scenes = SceneData(config, arguments.data, "deblender", workers=0)
    module = VaeModule(config, "deblender", scenes.kernel_power())
    module.load_state_dict(load_weights(arguments.weights))
    module.eval()
    batch = next(
        scenes.composer("validation", arguments.isolated)(np.random.default_rng(5)).batches(arguments.samples)
    )
    r = config.bands.index(reference_band(config.bands))
    models = []
    with torch.no_grad():
        for image in torch.from_numpy(batch.image).split(100):
            models.append(module.decoder(module.encoder(image)[0])[:, r].double().numpy())
    model, truth = np.concatenate(models), batch.target[:, r].astype(float)
    total = truth.sum((1, 2))
    area = total**2 / (truth**2).sum((1, 2))
    snr = np.sqrt(squared_snr(total, batch.noise[:, r], area, batch.psf_moments[:, r]))
    psf = psf_stamp(config.blend, scenes.survey.bands[r])
    true, found = (np.array([ksb_shape(x, psf) for x in images]) for images in (truth, model))
    sound = np.isfinite(true + found).all(axis=1) & (np.hypot(*true.T) < 0.9)
    flux_error = np.abs(model.sum((1, 2)) / total - 1)

    print("|S/N|n|m|median error of abs(e)|median abs(flux error)|\n|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for low, high in [(EDGES[0], np.inf), *pairwise(EDGES)]:
        own = sound & (snr > low) & (snr < high)
        bias = shear_bias(true[own], found[own], rng)
        e_error = np.median(np.hypot(*found[own].T) - np.hypot(*true[own].T))
        print(
            f"|{low:g}-{high:g}|{own.sum()}|{bias.mean:.3f} +- {bias.mean_err:.3f}|{e_error:.3f}"
            f"|{np.median(flux_error[own]):.3f}|"
        )


if __name__ == "__main__":
    main()

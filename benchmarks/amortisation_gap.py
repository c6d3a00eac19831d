# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where shapes are lost: in the encoder's answer, or in what the decoder can draw?

usage: python benchmarks/amortisation_gap.py CONFIG DATA RUN [--samples 512] [--steps 150]

Isolated sources of the test bank are drawn three times: from the encoder's latent variables; from those
refined by gradient descent against the noisy pixels; and from those refined against the noiseless truth, the
best that the decoder can do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.ground.statistics import nmad
from lsst.meas.vaedeblend.simulation.config import load_config
from lsst.meas.vaedeblend.simulation.galaxies import MODEL_SIGMA, GalaxyBank
from lsst.meas.vaedeblend.simulation.ksb import ksb_shape
from lsst.meas.vaedeblend.simulation.scenes import SceneComposer
from lsst.meas.vaedeblend.training.fit import SceneData, VaeModule
from lsst.meas.vaedeblend.training.weights import load_weights


def refine(decoder, latent, data, valid, noise, kernel, steps, prior):
    """Minimise chi2 / 2 + prior |z|^2 / 2 over the latent variables, with Adam."""
    latent = latent.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latent], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = data.shape[-1]
    for _ in range(steps):
        optimizer.zero_grad()
        model = torch.fft.irfft2(torch.fft.rfft2(decoder(latent)) * kernel, s=(size, size))
        residual = (model - data) * valid / noise[:, :, None, None]
        loss = 0.5 * residual.square().sum((1, 2, 3)) + 0.5 * prior * latent.square().sum(1)
        # The logarithm gives bright and faint sources steps of comparable worth.
        torch.log1p(loss).sum().backward()
        optimizer.step()
        schedule.step()
    return latent.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()

    config = load_config(arguments.config)
    config.scene.mask_fraction = config.scene.band_dropout = 0.0
    scenes = SceneData(config, arguments.data, "deblender", workers=0)
    module = VaeModule(config, "deblender", scenes.kernel_power())
    module.load_state_dict(load_weights(arguments.run / "deblender" / "final.ckpt"))
    module.eval()
    torch.set_flush_denormal(True)
    bank = GalaxyBank.load(arguments.data / "test.npz")
    rng = np.random.default_rng(3)
    composer = SceneComposer(bank, scenes.psfs, scenes.survey, config.scene, rng, isolated=True)
    batch = next(composer.batches(arguments.samples))
    image, noise, target = (torch.from_numpy(a) for a in (batch.image, batch.noise, batch.target))
    valid, moments = torch.from_numpy(batch.valid).float(), torch.from_numpy(batch.psf_moments)
    kernel = torch.from_numpy(scenes.psfs.kernels(config.scene.cutout_size)[batch.psf_index])
    size = image.shape[-1]
    truth_seen = torch.fft.irfft2(torch.fft.rfft2(target) * kernel, s=(size, size))
    with torch.no_grad():
        mean, _ = module.encoder(image, valid, noise, moments)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    common = (valid, noise, kernel, arguments.steps)
    latents = {
        "encoder": mean,
        "refined on the pixels": refine(module.decoder, mean, image, *common, prior=1.0),
        "refined on the truth": refine(module.decoder, mean, truth_seen, *common, prior=0.0),
    }
    ref = len(config.bands) // 3
    truth = target[:, ref].numpy().astype(float)
    snr = torch.sqrt((truth_seen[:, ref] ** 2).sum((1, 2))).numpy() / batch.noise[:, ref]
    psf = gaussian_psf(MODEL_SIGMA, 25)
    e_true = np.array([ksb_shape(t, psf) for t in truth])
    print("latents                 S/N in r     n  flux NMAD  cosine  e error NMAD  response m")
    for name, latent in latents.items():
        with torch.no_grad():
            model = module.decoder(latent)[:, ref].numpy().astype(float)
        error = np.array([ksb_shape(t, psf) for t in model]) - e_true
        flux = model.sum((1, 2)) / truth.sum((1, 2)) - 1
        cosine = (truth * model).sum((1, 2)) / np.sqrt((truth**2).sum((1, 2)) * (model**2).sum((1, 2)))
        for low, high in ((10, 30), (30, 100), (100, np.inf)):
            use = (snr > low) & (snr <= high)
            sound = use & np.isfinite(error + e_true).all(axis=1) & (np.hypot(*e_true.T) < 0.9)
            sound &= np.hypot(*error.T) < 1
            m = np.polyfit(e_true[sound].ravel(), error[sound].ravel(), 1)[0]
            print(
                f"{name:22s}  {low:3d} to {high:3.0f}  {use.sum():4d}  {nmad(flux[use]):9.3f}  "
                f"{cosine[use].mean():6.4f}  {nmad(error[sound]):12.3f}  {m:10.3f}"
            )


if __name__ == "__main__":
    main()

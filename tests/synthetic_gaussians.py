# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small network that draws Gaussians, with all graphs that a trained one has.

Its latents mean something: offsets, size, two ellipticities, brightness and two colours, each of about unit
scatter. The dense layers add a little to all that the decoder draws with, so that nothing is linear. The
encoder measures weighted moments, as that of `synthetic` does, and answers in these latents.

The files are in tests/data, since exports take minutes; ``python tests/synthetic_gaussians.py`` writes them
anew. `test_inference.py` holds them against what is here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import synthetic
import torch
from lsst.meas.vaedeblend.network import embed_metadata
from lsst.meas.vaedeblend.simulation.config import NetworkConfig
from lsst.meas.vaedeblend.simulation.galaxies import MODEL_SIGMA
from lsst.meas.vaedeblend.training.export import _to_onnx, fit_graphs
from lsst.meas.vaedeblend.training.networks import Deblender, Decoder
from torch import Tensor, nn

BANDS = ("g", "r", "i")
SIZE, LENGTH = 64, 8

CENTRE_SCALE, RADIUS_SCALE, ETA_SCALE = 0.7, 0.5, 0.4
LOG_FLUX = 6.5
"""Natural log of the flux in nJy at the origin."""

COLOURS = np.array([[2.2, -0.6, 0.4], [2.2, 0.0, -0.8], [2.2, 0.6, 0.4]])
"""From the last three latents to natural logs of fluxes."""

_WINDOW = 2.0
"""Standard deviation of the window in which the encoder measures, pixel."""


def make_decoder(seed: int = 5) -> Decoder:
    """Make the decoder: one profile of three Gaussians, and a free one that is faint."""
    torch.manual_seed(seed)
    config = NetworkConfig()
    config.latent_size, config.hidden = LENGTH, 8
    config.profiles, config.rungs, config.free_gaussians = 1, 3, 1
    decoder = Decoder(len(BANDS), SIZE, config).eval().requires_grad_(False)
    start, at = {}, 0
    for name, n in decoder._sizes.items():
        start[name], at = at, at + n
    w, b = decoder.skip.weight, decoder.skip.bias
    w[:], b[:] = 0.0, 0.0
    w[:3, 5:] = torch.tensor(COLOURS, dtype=torch.float32)
    b[:3] = LOG_FLUX - decoder.log_flux_offset
    for axis in range(2):
        w[start["centre"] + axis, axis] = CENTRE_SCALE
        w[start["eta"] + axis, 3 + axis] = ETA_SCALE
    # The middle one of the three Gaussians is to be as wide as the source.
    w[start["log_radius"], 2] = RADIUS_SCALE
    b[start["log_radius"]] = -decoder.log_radius_offset - float(decoder.ladder[1])
    b[start["ladder"] : start["ladder"] + 3] = torch.tensor([-2.0, 2.5, -3.0])
    b[start["free_centre"]], b[start["free_log_radius"]] = 0.3, 0.2
    b[start["share"] + 3 :] = torch.tensor([-4.0, -4.5, -5.0])
    # What the dense layers add: little to what the encoder knows of, more to the rest.
    last = decoder.hidden[-1]
    last.weight.normal_(std=0.01)
    last.weight[start["ladder"] : start["free_centre"]].normal_(std=0.1)
    last.weight[start["free_centre"] :].normal_(std=0.2)
    last.bias[:] = 0.0
    return decoder


class MomentEncoder(nn.Module):
    """Weighted moments of the object in the middle, as latents of the decoder."""

    inputs = ("image", "valid", "noise", "psf_moments")

    def __init__(self) -> None:
        super().__init__()
        line = torch.arange(float(SIZE)) - SIZE // 2
        y, x = torch.meshgrid(line, line, indexing="ij")
        window = torch.exp(-0.5 * (x * x + y * y) / _WINDOW**2)
        kernels = torch.stack([window, window * x, window * y, window * 0.5 * (x * x + y * y)])
        self.register_buffer("kernels", kernels.reshape(4, -1))
        self.register_buffer("colours", torch.tensor(np.linalg.inv(COLOURS).T, dtype=torch.float32))

    def forward(
        self, image: Tensor, valid: Tensor, noise: Tensor, psf_moments: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give means and widths of the latents; see `lsst.meas.vaedeblend.training.networks.Encoder`."""
        moments = (image * valid).flatten(2) @ self.kernels.T
        total = moments.sum(1)
        norm = torch.maximum(total[:, 0], noise.sum(1))
        mx, my = total[:, 1] / norm, total[:, 2] / norm
        spread = (total[:, 3] / norm - 0.5 * (mx * mx + my * my)).clamp(0.3, 0.8 * _WINDOW**2)
        variance = 1.0 / (1.0 / spread - 1.0 / _WINDOW**2)
        gain = variance / _WINDOW**2 + 1.0
        dx, dy = (mx * gain).clamp(-1.5, 1.5), (my * gain).clamp(-1.5, 1.5)
        boost = torch.exp((dx * dx + dy * dy) / (gain * _WINDOW**2 * 2.0))
        flux = torch.maximum(moments[:, :, 0] * (gain * boost)[:, None], noise)
        intrinsic = (variance - psf_moments[:, :, :2].mean((1, 2))).clamp(min=0.05)
        radius = 0.5 * torch.log(intrinsic) / RADIUS_SCALE
        brightness = (torch.log(flux) - LOG_FLUX) @ self.colours
        offsets = torch.stack([dx / CENTRE_SCALE, dy / CENTRE_SCALE, radius, 0.0 * radius, 0.0 * radius], 1)
        mean = torch.cat([offsets, brightness], 1)
        return mean, 0.1 + 0.01 * mean.abs()


def write_gaussian_network(directory: Path, seed: int = 5) -> Path:
    """Write the deblender, its decoder and the graphs for fitting; return the path of the first."""
    decoder = make_decoder(seed)
    meta = synthetic.metadata(BANDS, SIZE, name="gaussians", latent_size=LENGTH)
    meta = dataclasses.replace(meta, frame={"type": "gaussian", "sigma": MODEL_SIGMA})
    deblender = Deblender(MomentEncoder(), decoder).eval()
    pixels = torch.rand(3, len(BANDS), SIZE, SIZE)
    moments = torch.tensor([2.0, 2.0, 0.0]).expand(3, len(BANDS), 3).contiguous()
    example = (pixels, torch.ones_like(pixels), torch.ones(3, len(BANDS)), moments, torch.zeros(3, LENGTH))
    with torch.no_grad():
        graphs = fit_graphs(decoder)
        graphs["deblender"] = _to_onnx(
            deblender, example, list(deblender.inputs), ["model", "latent_mean", "latent_sigma"]
        )
        graphs["decoder"] = _to_onnx(decoder, (torch.randn(3, LENGTH),), ["latent"], ["model"])
    path = Path(directory) / f"{meta.name}.onnx"
    for kind, graph in graphs.items():
        file = path if kind == "deblender" else path.with_name(f"{meta.name}_{kind}.onnx")
        file.write_bytes(embed_metadata(graph, dataclasses.replace(meta, kind=kind)))
    return path


if __name__ == "__main__":
    write_gaussian_network(Path(__file__).parent / "data")

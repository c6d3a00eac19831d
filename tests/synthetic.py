# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks and scenes of known behaviour, for the tests.

The synthetic network keeps the contract of a trained one but is analytic: it takes the object in the middle
of a cutout for a round Gaussian, measures its place, size and fluxes with weighted moments, and returns that
Gaussian without its PSF. On scenes of Gaussian galaxies, which `make_scene` makes, it deblends usefully.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.network import NetworkMetadata, embed_metadata
from lsst.meas.vaedeblend.scene import Parent, PsfGrid, Scene, find_parents
from onnx import TensorProto, helper, numpy_helper
from scipy import ndimage
from scipy.special import erf

SIGMA = 0.8
"""Standard deviation of the model frame's Gaussian, pixel."""

_WINDOW = 2.0
"""Standard deviation of the window that the network measures in, pixel."""

_PIXEL = 1.0 / 12.0
"""Variance of a pixel, pixel^2."""

FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))


def metadata(bands: Sequence[str] = ("g", "r", "i"), size: int = 64, kind: str = "deblender", **changes):
    """Make the metadata of a synthetic network; ``changes`` replace fields."""
    fields = dict(
        name="synthetic",
        kind=kind,
        bands=tuple(bands),
        pixel_scale=0.2,
        cutout_size=size,
        latent_size=3 + len(bands),
        frame={"type": "gaussian", "sigma": SIGMA},
        centre=(size // 2, size // 2),
        training_range={"noise": {band: [0.1, 100.0] for band in bands}, "psf_fwhm": [0.4, 1.6]},
        training={"description": "none: analytic"},
        figures_of_merit={},
        licence="GPL-3.0-or-later",
    )
    return NetworkMetadata(**{**fields, **changes})


class _Graph:
    """Collects the nodes of a graph, to write formulas rather than names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs, **attributes) -> str:
        names = [self.constant(i) if not isinstance(i, str) else i for i in inputs]
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def constant(self, value, dtype=np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def axes(self, *values: int) -> str:
        return self.constant(np.array(values), np.int64)

    def decode(self, latent: str, bands: int, size: int, centre: tuple[float, float]) -> str:
        """Latents (dx, dy, variance, fluxes) to Gaussians of these fluxes: (N, B, S, S)."""
        dx, dy, var, flux = (
            self("Slice", latent, self.axes(a), self.axes(b), self.axes(1))
            for a, b in ((0, 1), (1, 2), (2, 3), (3, 3 + bands))
        )
        var = self("Max", var, 0.3)
        profiles = []
        for offset, middle, axis in ((dy, centre[0], 3), (dx, centre[1], 2)):
            distance = self("Sub", np.arange(size)[None] - middle, offset)
            exponent = self("Div", self("Mul", distance, distance), self("Mul", var, -2.0))
            norm = self("Sqrt", self("Mul", var, 2 * np.pi))
            profile = self("Div", self("Exp", exponent), norm)
            profiles.append(self("Unsqueeze", profile, self.axes(1, axis)))
        return self("Mul", self("Mul", *profiles), self("Unsqueeze", flux, self.axes(2, 3)))

    def model(self, name: str, inputs: dict[str, list], outputs: dict[str, tuple[str, list]]) -> bytes:
        """Serialize the graph: input name to shape, output name to (value, shape)."""
        for output, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [output]))
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in inputs.items()],
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, (_, s) in outputs.items()],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def _frame_sigma(meta: NetworkMetadata) -> float:
    """Sigma of the frame's Gaussian, pixel: the mean over bands for the observed frame."""
    if meta.frame["type"] == "gaussian":
        return meta.frame["sigma"]
    return float(np.mean(list(meta.frame["fwhm"].values()))) / FWHM / meta.pixel_scale


def deblender_bytes(
    meta: NetworkMetadata,
    inputs: Sequence[str] = ("image", "valid", "noise", "psf_moments", "epsilon"),
    nan_above: float | None = None,
    empty: bool = False,
) -> bytes:
    """Serialize the synthetic deblender, without metadata.

    ``nan_above`` makes the output NaN for objects with a flux above it in the first band (nJy); ``empty``
    makes all models 0. Without the input ``psf_moments`` the PSF is taken for one of sigma 1.5 pixel.
    """
    b, s, length, (cy, cx) = len(meta.bands), meta.cutout_size, meta.latent_size, meta.centre
    g = _Graph()
    dx, dy = np.arange(s)[None, :] - cx, np.arange(s)[:, None] - cy
    window = np.exp(-0.5 * (dx**2 + dy**2) / _WINDOW**2)
    image = g("Mul", "image", "valid") if "valid" in inputs else "image"

    def moment(kernel: np.ndarray, source: str, *axes: int) -> str:
        return g("ReduceSum", g("Mul", source, kernel), g.axes(*axes), keepdims=0)

    total = g("ReduceSum", image, g.axes(1), keepdims=0)
    floor = (
        g("Mul", g("ReduceSum", "noise", g.axes(1), keepdims=0), 1.0)
        if "noise" in inputs
        else g.constant(1e-3)
    )
    norm = g("Max", moment(window, total, 1, 2), floor)
    mean_x = g("Div", moment(window * dx, total, 1, 2), norm)
    mean_y = g("Div", moment(window * dy, total, 1, 2), norm)
    second = g("Div", moment(window * (dx**2 + dy**2) / 2, total, 1, 2), norm)
    spread = g("Sub", second, g("Mul", g("Add", g("Mul", mean_x, mean_x), g("Mul", mean_y, mean_y)), 0.5))
    # The window takes a Gaussian of variance v to one of 1 / (1 / v + 1 / window^2), its mean in proportion.
    spread = g("Clip", spread, 0.3, 0.8 * _WINDOW**2)
    var = g("Div", 1.0, g("Sub", g("Div", 1.0, spread), 1 / _WINDOW**2))
    gain = g("Add", g("Div", var, _WINDOW**2), 1.0)
    off_x = g("Clip", g("Mul", mean_x, gain), -1.5, 1.5)
    off_y = g("Clip", g("Mul", mean_y, gain), -1.5, 1.5)
    distance = g("Add", g("Mul", off_x, off_x), g("Mul", off_y, off_y))
    boost = g("Exp", g("Div", distance, g("Mul", g("Mul", gain, _WINDOW**2), 2.0)))
    flux = g("Mul", moment(window, image, 2, 3), g("Unsqueeze", g("Mul", gain, boost), g.axes(1)))
    flux = g("Relu", flux)
    if "psf_moments" in inputs:
        round_psf = g(
            "ReduceMean", g("Slice", "psf_moments", g.axes(0), g.axes(2), g.axes(2)), g.axes(1, 2), keepdims=0
        )
    else:
        round_psf = g.constant(1.5**2 + _PIXEL)
    # The pixel-integrated PSF of the network's frame takes the place of the scene's.
    own_psf = _frame_sigma(meta) ** 2 + _PIXEL
    var = g("Max", g("Add", g("Sub", var, round_psf), own_psf), own_psf)
    parts = [g("Unsqueeze", v, g.axes(1)) for v in (off_x, off_y, var)]
    mean = g("Concat", *parts, flux, axis=1)
    sigma = g("Add", g("Mul", g("Abs", mean), 0.01), 0.1)
    latent = g("Add", mean, g("Mul", sigma, "epsilon")) if "epsilon" in inputs else mean
    model = g.decode(latent, b, s, meta.centre)
    if empty:
        model = g("Mul", model, 0.0)
    if nan_above is not None:
        first = g("Slice", flux, g.axes(0), g.axes(1), g.axes(1))
        bad = g("Unsqueeze", g("Greater", first, nan_above), g.axes(2, 3))
        model = g("Where", bad, float("nan"), model)
    shapes = {
        "image": ["N", b, s, s],
        "valid": ["N", b, s, s],
        "noise": ["N", b],
        "psf_moments": ["N", b, 3],
        "epsilon": ["N", length],
    }
    return g.model(
        meta.name,
        {name: shapes[name] for name in inputs},
        {
            "model": (model, ["N", b, s, s]),
            "latent_mean": (mean, ["N", length]),
            "latent_sigma": (sigma, ["N", length]),
        },
    )


def decoder_bytes(meta: NetworkMetadata) -> bytes:
    """Serialize the decoder of the synthetic deblender, without metadata."""
    g = _Graph()
    b, s = len(meta.bands), meta.cutout_size
    model = g.decode("latent", b, s, meta.centre)
    return g.model(meta.name, {"latent": ["N", meta.latent_size]}, {"model": (model, ["N", b, s, s])})


def write_network(directory: Path, meta: NetworkMetadata | None = None, **options) -> Path:
    """Write a synthetic deblender and its decoder; return the path of the former.

    ``options`` go to `deblender_bytes`.
    """
    meta = metadata() if meta is None else meta
    path = Path(directory) / f"{meta.name}.onnx"
    path.write_bytes(embed_metadata(deblender_bytes(meta, **options), meta))
    decoder = dataclasses.replace(meta, kind="decoder")
    path.with_name(f"{meta.name}_decoder.onnx").write_bytes(embed_metadata(decoder_bytes(meta), decoder))
    return path


def write_truncated(path: Path, fraction: float = 0.5) -> Path:
    """Write the first part of a network's file beside it; return the path of the copy."""
    data = path.read_bytes()
    copy = path.with_name("truncated.onnx")
    copy.write_bytes(data[: int(len(data) * fraction)])
    return copy


def write_tampered(path: Path) -> Path:
    """Write a copy of a network with one constant of its graph changed; return its path."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    copy = path.with_name("tampered.onnx")
    copy.write_bytes(model.SerializeToString())
    return copy


def write_foreign(directory: Path) -> Path:
    """Write a sound ONNX file that knows nothing of this package; return its path."""
    path = Path(directory) / "foreign.onnx"
    path.write_bytes(deblender_bytes(metadata()))
    return path


def gaussian_image(shape: tuple[int, int], x: float, y: float, sigma: float) -> np.ndarray:
    """Render a round Gaussian of unit flux, integrated over pixels: (H, W)."""
    along_y = np.diff(erf((np.arange(shape[0] + 1) - 0.5 - y) / (np.sqrt(2) * sigma))) / 2
    along_x = np.diff(erf((np.arange(shape[1] + 1) - 0.5 - x) / (np.sqrt(2) * sigma))) / 2
    return along_y[:, None] * along_x[None, :]


@dataclasses.dataclass
class Truth:
    """What is in a synthetic scene: positions (N,), fluxes (N, B) in nJy, sizes (N,) in pixels."""

    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray
    size: np.ndarray


def make_scene(
    x: Sequence[float],
    y: Sequence[float],
    flux: np.ndarray,
    size: Sequence[float] | float = 1.0,
    *,
    shape: tuple[int, int] = (128, 128),
    bands: Sequence[str] = ("g", "r", "i"),
    noise: float = 1.0,
    psf_sigma: Sequence[float] | float = 1.5,
    peaks: bool | Sequence[int] = True,
    one_parent: bool = False,
    seed: int = 1,
) -> tuple[Scene, Truth]:
    """Make a scene of round Gaussian galaxies.

    Parameters
    ----------
    x, y : sequence, (N,)
        Positions, scene coordinates.
    flux : array_like, (N, B)
        Fluxes, nJy.
    size : sequence or `float`
        Standard deviation of the galaxies before the PSF, pixel.
    shape, bands, noise, psf_sigma
        Of the scene; noise in nJy per pixel, PSF sigma in pixels.
    peaks : `bool` or sequence of `int`
        Whether the peaks are given, or which ones.
    one_parent : `bool`
        Whether the whole scene is one parent, rather than what rises above the noise.
    seed : `int`
        Of the noise.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    flux = np.asarray(flux, float).reshape(len(x), len(bands))
    size = np.broadcast_to(np.asarray(size, float), x.shape)
    psf_sigma = np.broadcast_to(np.asarray(psf_sigma, float), (len(bands),))
    image = np.zeros((len(bands), *shape))
    for i in range(len(x)):
        for band, sigma in enumerate(psf_sigma):
            image[band] += flux[i, band] * gaussian_image(shape, x[i], y[i], np.hypot(size[i], sigma))
    clean = ndimage.gaussian_filter(image.sum(axis=0), psf_sigma.mean())
    image += np.random.default_rng(seed).normal(0.0, noise, image.shape)
    variance = np.full(image.shape, noise**2)
    chosen = (
        np.arange(len(x)) if peaks is True else np.array([], int) if peaks is False else np.asarray(peaks)
    )
    given = np.stack([x[chosen], y[chosen]], axis=1)
    if one_parent:
        parents = [Parent(1, 0, 0, np.ones(shape, bool), given)]
    else:
        parents = find_parents(clean > noise, given)
    psf = PsfGrid.constant(np.stack([gaussian_psf(sigma, 25) for sigma in psf_sigma]))
    scene = Scene(bands, image, variance, psf=psf, pixel_scale=0.2, parents=parents)
    return scene, Truth(x, y, flux, size)

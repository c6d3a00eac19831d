# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks: what goes into them, what comes out, and which belong together."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._files import resolve
from ._metadata import NetworkError
from ._session import Artefact

__all__ = [
    "Decoder",
    "Linearisation",
    "Linearise",
    "Mixture",
    "Network",
    "NetworkOutput",
    "Render",
    "load_network",
]

PIXEL_SCALE_TOLERANCE = 0.01
"""Relative difference up to which two pixel scales count as the same."""


@dataclasses.dataclass(frozen=True)
class NetworkOutput:
    """What a deblender makes of N cutouts.

    Parameters
    ----------
    model : `numpy.ndarray`, (N, B, S, S)
        The centred objects alone in the model frame, nJy, float32.
    latent_mean, latent_sigma : `numpy.ndarray`, (N, L)
        The approximate posterior, float32.
    finite : `numpy.ndarray`, (N,)
        False where the network returned anything not finite, or a negative posterior width; all three arrays
        are zero in these rows.
    """

    model: NDArray[np.float32]
    latent_mean: NDArray[np.float32]
    latent_sigma: NDArray[np.float32]
    finite: NDArray[np.bool_]


class Decoder(Artefact):
    """The generative half of a network: latents to models.

    Parameters
    ----------
    path : `pathlib.Path`
        The file.
    providers, require, threads
        See `Network.load`.

    Raises
    ------
    NetworkError
        Raised if the file is not a sound decoder.
    """

    kind = "decoder"

    def render(self, latent: ArrayLike, batch_size: int = 128) -> NDArray[np.float32]:
        """Render models from latents.

        Parameters
        ----------
        latent : array_like, (N, L)
            Latent vectors.
        batch_size : `int`, optional
            Latents that go through the network at once.

        Returns
        -------
        model : `numpy.ndarray`, (N, B, S, S)
            Models in the model frame, nJy. Not checked for being finite.

        Raises
        ------
        ValueError
            Raised if the latents have the wrong shape.
        NetworkError
            Raised if onnxruntime fails.
        """
        latent = np.ascontiguousarray(latent, dtype=np.float32)
        if latent.ndim != 2 or latent.shape[1] != self.metadata.latent_size:
            raise ValueError(
                f"latent should have shape (N, {self.metadata.latent_size}), not {latent.shape}."
            )
        if not len(latent):
            m = self.metadata
            return np.zeros((0, len(m.bands), m.cutout_size, m.cutout_size), np.float32)
        return self.run(["model"], {"latent": latent}, {}, batch_size)[0]


class Mixture(NamedTuple):
    """The Gaussians that sources are made of.

    Attributes
    ----------
    weight : `numpy.ndarray`, (N, B, G)
        Their fluxes, nJy.
    position : `numpy.ndarray`, (N, G, 2)
        Their centres (x, y) from the target's pixel, pixel.
    covariance : `numpy.ndarray`, (N, G, 3)
        Their second moments xx, xy, yy, without PSF and pixel, pixel^2.
    """

    weight: NDArray[np.float32]
    position: NDArray[np.float32]
    covariance: NDArray[np.float32]


class Render(Artefact):
    """The decoder of a network that draws Gaussians, for squares of any width and any PSF.

    Parameters
    ----------
    path : `pathlib.Path`
        The file.
    providers, require, threads
        See `Network.load`.

    Raises
    ------
    NetworkError
        Raised if the file is not a sound renderer.
    """

    kind = "render"

    def images(
        self, latent: NDArray, cell: NDArray, common: dict[str, Any], batch_size: int
    ) -> tuple[NDArray[np.float32], Mixture]:
        """Draw sources as a coadd shows them.

        Parameters
        ----------
        latent : `numpy.ndarray`, (N, L)
            Latent vectors.
        cell : `numpy.ndarray`, (N,)
            Which of the kernels to use.
        common : `dict`
            Kernels, pixels and Fourier transforms; `lsst.meas.vaedeblend.inference.Grids` makes them.
        batch_size : `int`
            Sources that go through the graph at once.

        Returns
        -------
        image : `numpy.ndarray`, (N, B, W, W)
            Observed images of unit flux.
        mixture : `Mixture`
            The Gaussians that they are made of.
        """
        rows: dict[str, NDArray] = {
            "latent": latent.astype(np.float32, copy=False),
            "cell": cell.astype(np.int64, copy=False),
        }
        image, *mixture = self.run(["image", "weight", "position", "covariance"], rows, common, batch_size)
        return image, Mixture(*mixture)

    def mixture(self, latent: NDArray, batch_size: int = 256) -> Mixture:
        """Give the Gaussians of sources; no pixel is drawn.

        Parameters
        ----------
        latent : `numpy.ndarray`, (N, L)
            Latent vectors.
        batch_size : `int`, optional
            Sources that go through the graph at once.

        Returns
        -------
        mixture : `Mixture`
            The Gaussians.
        """
        rows: dict[str, NDArray] = {
            "latent": latent.astype(np.float32, copy=False),
            "cell": np.zeros(len(latent), np.int64),
        }
        common = _no_pixels(len(self.metadata.bands))
        return Mixture(*self.run(["weight", "position", "covariance"], rows, common, batch_size))


class Linearisation(NamedTuple):
    """What the linearised models of sources say.

    Attributes
    ----------
    gradient : `numpy.ndarray`, (N, L)
        Sum over bands and pixels of the derivatives of a source times residual over variance.
    block : `numpy.ndarray`, (N, L, L)
        J^T W J with the derivatives J and the inverse variances W.
    tangent : `numpy.ndarray`, (N, B, L, V, V)
        J times the root of W, on coarse pixels.
    """

    gradient: NDArray[np.float32]
    block: NDArray[np.float32]
    tangent: NDArray[np.float32]


class Linearise(Artefact):
    """Derivatives of chi-square with respect to the latents.

    Parameters
    ----------
    path : `pathlib.Path`
        The file.
    providers, require, threads
        See `Network.load`.

    Raises
    ------
    NetworkError
        Raised if the file is not sound.
    """

    kind = "linearise"

    def models(
        self,
        latent: NDArray,
        cell: NDArray,
        psf_moments: NDArray,
        weighted: NDArray,
        weight: NDArray,
        u: NDArray,
        v: NDArray,
        common: dict[str, Any],
        batch_size: int,
    ) -> Linearisation:
        """Linearise sources.

        Parameters
        ----------
        latent : `numpy.ndarray`, (N, L)
            Latent vectors.
        cell : `numpy.ndarray`, (N,)
            Which of the kernels to use.
        psf_moments : `numpy.ndarray`, (N, B, 3)
            Ixx, Iyy, Ixy of the PSF, pixel^2; it stands for the PSF in J, not in the gradient.
        weighted : `numpy.ndarray`, (N, B, W, W)
            Residual over variance, nJy^-1.
        weight : `numpy.ndarray`, (N, B, V, V)
            Inverse variances, nJy^-2, summed over coarse pixels.
        u, v : `numpy.ndarray`, (N, V)
            Columns and rows of the middles of the coarse pixels, from the target's pixel.
        common : `dict`
            Kernels, pixels and Fourier transforms; `lsst.meas.vaedeblend.inference.Grids` makes them.
        batch_size : `int`
            Sources that go through the graph at once.

        Returns
        -------
        linearisation : `Linearisation`
            Gradients and Gauss-Newton matrices.
        """
        rows: dict[str, NDArray] = {
            "latent": latent.astype(np.float32, copy=False),
            "cell": cell.astype(np.int64, copy=False),
            "psf_moments": psf_moments.astype(np.float32, copy=False),
            "weighted": weighted,
            "weight": weight,
            "u": u.astype(np.float32, copy=False),
            "v": v.astype(np.float32, copy=False),
        }
        return Linearisation(*self.run(["gradient", "block", "tangent"], rows, common, batch_size))

    def parameters(
        self, latent: NDArray, batch_size: int = 256
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give what a catalogue wants to know of the models, and its derivatives; no pixel is drawn.

        Parameters
        ----------
        latent : `numpy.ndarray`, (N, L)
            Latent vectors.
        batch_size : `int`, optional
            Sources that go through the graph at once.

        Returns
        -------
        parameters : `numpy.ndarray`, (N, B, 6)
            Natural log of the flux in nJy, centroid (x, y) from the target's pixel, and intrinsic second
            moments Ixx, Iyy, Ixy, pixel^2.
        jacobian : `numpy.ndarray`, (N, B, 6, L)
            Derivatives.
        """
        n, b = len(latent), len(self.metadata.bands)
        rows: dict[str, NDArray] = {
            "latent": latent.astype(np.float32, copy=False),
            "cell": np.zeros(n, np.int64),
            "psf_moments": np.tile(np.array([1, 1, 0], np.float32), (n, b, 1)),
            "weighted": np.zeros((n, b, 1, 1), np.float32),
            "weight": np.zeros((n, b, 1, 1), np.float32),
            "u": np.zeros((n, 1), np.float32),
            "v": np.zeros((n, 1), np.float32),
        }
        common = _no_pixels(b)
        values, jacobian = self.run(["parameters", "parameter_jacobian"], rows, common, batch_size)
        return values, jacobian


def _no_pixels(bands: int) -> dict[str, NDArray[np.float32]]:
    """What the graphs for fitting share among sources, where no pixel of them is wanted."""
    shapes: dict[str, tuple[int, ...]] = {"columns": (1, 2), "rows": (2, 2), "back_rows": (2, 2)}
    shapes["back_columns"] = (2, 1)
    shapes |= {"x": (1,), "y": (1,), "kernels": (1, 2, bands, 1, 1)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


class Network(Artefact):
    """A deblender: cutouts of blends to models of the centred objects.

    Make one with `load`, or with `load_network`, which remembers it.

    Attributes
    ----------
    metadata : `NetworkMetadata`
        What the artefact says of itself.
    provider : `str`
        The execution provider in use.
    path : `pathlib.Path`
        The file it came from.
    """

    kind = "deblender"
    _decoder: Decoder | None = None
    _render: Render | None = None
    _linearise: Linearise | None = None

    def __init__(
        self,
        path: Path,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        require: bool = False,
        threads: int = 0,
    ) -> None:
        super().__init__(path, providers, require, threads)
        self._draws = "model" in self._outputs
        if not self._draws:
            # Half of the network, without which the other half is none.
            self.decoder  # noqa: B018

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        providers: Sequence[str] = ("CPUExecutionProvider",),
        require: bool = False,
        threads: int = 0,
        bands: Sequence[str] | None = None,
        pixel_scale: float | None = None,
    ) -> Network:
        """Load a network and check it.

        Parameters
        ----------
        name_or_path : `str` or path-like
            The name of a shipped network, or the path of an ONNX file.
        providers : `~collections.abc.Sequence` [`str`], optional
            onnxruntime's execution providers in order of preference; the CPU is always the last resort.
        require : `bool`, optional
            Whether it is an error if the first of them is absent.
        threads : `int`, optional
            Threads within an operation; 0 leaves it to onnxruntime.
        bands : `~collections.abc.Sequence` [`str`], optional
            Bands in the order in which the caller is going to feed them.
        pixel_scale : `float`, optional
            Width of the caller's pixels, arcsec.

        Returns
        -------
        network : `Network`
            The network.

        Raises
        ------
        NetworkError
            Raised if the artefact is missing, unsound, or does not go with what the caller needs.
        """
        network = cls(resolve(name_or_path), providers, require, threads)
        network.check(bands, pixel_scale)
        return network

    def check(self, bands: Sequence[str] | None = None, pixel_scale: float | None = None) -> None:
        """Check that data go with this network.

        Parameters
        ----------
        bands : `~collections.abc.Sequence` [`str`], optional
            Bands of the data, in order.
        pixel_scale : `float`, optional
            Width of the data's pixels, arcsec.

        Raises
        ------
        NetworkError
            Raised if the bands are others or in another order, or the pixel scale differs by more than a
            hundredth.
        """
        mine = self.metadata
        if bands is not None and tuple(bands) != mine.bands:
            raise NetworkError(
                f"{self.path}: the network's bands are {list(mine.bands)}, the data's are {list(bands)}."
            )
        scales = {b: s for b, s in mine.frame.get("pixel_scale", {}).items() if s != mine.pixel_scale}
        if pixel_scale is not None and scales:
            raise NetworkError(
                f"{self.path}: the network's pixels are {mine.pixel_scale} arcsec wide but for {scales}: it "
                f"cannot read images whose pixels are all {pixel_scale} arcsec wide."
            )
        if pixel_scale is not None and not (
            abs(pixel_scale - mine.pixel_scale) <= PIXEL_SCALE_TOLERANCE * mine.pixel_scale
        ):
            raise NetworkError(
                f"{self.path}: the network's pixels are {mine.pixel_scale} arcsec wide, "
                f"the data's {pixel_scale} arcsec."
            )

    @property
    def decoder(self) -> Decoder:
        """The decoder that belongs to this network, from a file beside it (`Decoder`).

        That is ``<stem>_decoder.onnx``, or the other network's that the metadata name.
        """
        if self._decoder is None:
            path = self._companion("decoder")
            if not path.is_file():
                raise NetworkError(f"{self.path}: its decoder {path} does not exist.")
            decoder = self._checked(Decoder(path, *self._arguments))
            mine, other = self.metadata.decoder_sha256, decoder.metadata.weights_sha256
            if mine not in ("", other):
                raise NetworkError(f"{path}: its graph has SHA-256 {other}, {self.path} needs {mine}.")
            self._decoder = decoder
        return self._decoder

    @property
    def can_fit(self) -> bool:
        """Whether latents can be fitted to pixels: both graphs for it lie beside the network (`bool`)."""
        return all(self._companion(kind).is_file() for kind in ("render", "linearise"))

    @property
    def render(self) -> Render:
        """The decoder for any PSF, from ``<stem>_render.onnx`` beside the network (`Render`)."""
        if self._render is None:
            self._render = self._checked(Render(self._companion("render"), *self._arguments))
        return self._render

    @property
    def linearise(self) -> Linearise:
        """The decoder's derivatives, from ``<stem>_linearise.onnx`` beside the network (`Linearise`)."""
        if self._linearise is None:
            self._linearise = self._checked(Linearise(self._companion("linearise"), *self._arguments))
        return self._linearise

    def _companion(self, kind: str) -> Path:
        stem = self.path.stem
        if kind == "decoder" and self.metadata.decoder:
            stem = self.metadata.decoder
        return self.path.with_name(f"{stem}_{kind}.onnx")

    def _checked[Companion: Artefact](self, companion: Companion) -> Companion:
        for key in ("name", "bands", "pixel_scale", "cutout_size", "latent_size", "frame", "centre"):
            mine, other = getattr(self.metadata, key), getattr(companion.metadata, key)
            if key == "name" and companion.kind == "decoder":
                mine = self.metadata.decoder or mine
            if mine != other:
                raise NetworkError(
                    f"{companion.path}: its {key} is {other!r}, that of {self.path} is {mine!r}."
                )
        return companion

    def encode(
        self,
        image: ArrayLike,
        valid: ArrayLike,
        noise: ArrayLike,
        psf_moments: ArrayLike,
        batch_size: int = 128,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Find the latents of the centred objects, without drawing them.

        Parameters
        ----------
        image, valid, noise, psf_moments, batch_size
            See `deblend`.

        Returns
        -------
        latent_mean, latent_sigma : `numpy.ndarray`, (N, L)
            The approximate posterior, float32.
        finite : `numpy.ndarray`, (N,)
            See `NetworkOutput`.

        Raises
        ------
        ValueError
            Raised if an array has the wrong shape.
        NetworkError
            Raised if onnxruntime fails.
        """
        feeds = self._feeds(image, valid, noise, psf_moments, None)
        mean, sigma = self._answers(["latent_mean", "latent_sigma"], feeds, batch_size)
        finite = _sound(mean, sigma)
        for array in (mean, sigma):
            array[~finite] = 0.0
        return mean, sigma, finite

    def deblend(
        self,
        image: ArrayLike,
        valid: ArrayLike,
        noise: ArrayLike,
        psf_moments: ArrayLike,
        epsilon: ArrayLike | None = None,
        batch_size: int = 128,
    ) -> NetworkOutput:
        """Deblend cutouts.

        Parameters
        ----------
        image : array_like, (N, B, S, S)
            Cutouts centred on peaks, nJy, bands in the network's order; 0 where not valid.
        valid : array_like, (N, B, S, S)
            Whether a pixel may be used.
        noise : array_like, (N, B)
            Background standard deviation per pixel, nJy.
        psf_moments : array_like, (N, B, 3)
            Ixx, Iyy, Ixy of the PSF, pixel^2.
        epsilon : array_like, (N, L), optional
            Standard normal draws; without them the models are those of the posterior mean.
        batch_size : `int`, optional
            Cutouts that go through the network at once, which bounds the memory it takes.

        Returns
        -------
        output : `NetworkOutput`
            Models and posteriors; what is not finite is reported in it, not raised.

        Raises
        ------
        ValueError
            Raised if an array has the wrong shape.
        NetworkError
            Raised if onnxruntime fails.
        """
        feeds = self._feeds(image, valid, noise, psf_moments, epsilon)
        if self._draws:
            model, mean, sigma = self._answers(["model", "latent_mean", "latent_sigma"], feeds, batch_size)
        else:
            mean, sigma = self._answers(["latent_mean", "latent_sigma"], feeds, batch_size)
            with np.errstate(over="ignore", invalid="ignore"):
                latent = mean + sigma * feeds["epsilon"]
            model = np.require(self.decoder.render(latent, batch_size), requirements="W")
        finite = _sound(mean, sigma)
        # A sum is not finite if any of its terms is not; it may overflow too, and then the model is no use.
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(model.sum(axis=(1, 2, 3)))
        for array in (model, mean, sigma):
            array[~finite] = 0.0
        return NetworkOutput(model, mean, sigma, finite)

    def _feeds(
        self,
        image: ArrayLike,
        valid: ArrayLike,
        noise: ArrayLike,
        psf_moments: ArrayLike,
        epsilon: ArrayLike | None,
    ) -> dict[str, NDArray]:
        m = self.metadata
        b, s = len(m.bands), m.cutout_size
        n = len(np.asarray(image))
        feeds = {}
        for name, array, shape in (
            ("image", image, (n, b, s, s)),
            ("valid", valid, (n, b, s, s)),
            ("noise", noise, (n, b)),
            ("psf_moments", psf_moments, (n, b, 3)),
            ("epsilon", epsilon, (n, m.latent_size)),
        ):
            if array is None:
                array = np.zeros(shape, np.float32)
            array = np.ascontiguousarray(array, dtype=np.float32)
            if array.shape != shape:
                raise ValueError(f"{name} should have shape {shape}, not {array.shape}.")
            feeds[name] = array
        return feeds

    def _answers(
        self, outputs: Sequence[str], feeds: dict[str, NDArray], batch_size: int
    ) -> list[NDArray[np.float32]]:
        """Run the graph; arrays are the caller's own."""
        if len(feeds["image"]):
            # What onnxruntime hands over may not be written to.
            return [np.require(a, requirements="W") for a in self.run(outputs, feeds, {}, batch_size)]
        m = self.metadata
        shapes = {"model": (len(m.bands), m.cutout_size, m.cutout_size)}
        return [np.zeros((0, *shapes.get(name, (m.latent_size,))), np.float32) for name in outputs]


def _sound(mean: NDArray, sigma: NDArray) -> NDArray[np.bool_]:
    """Which posteriors are finite, with widths that are not negative, (N,)."""
    return np.isfinite(mean).all(axis=1) & (np.isfinite(sigma) & (sigma >= 0)).all(axis=1)


_CACHE: collections.OrderedDict[tuple, Network] = collections.OrderedDict()
_LOCK = threading.RLock()
MAX_CACHED = 8
"""Networks that a process keeps; the one that was not asked for longest goes."""


def load_network(
    name_or_path: str | os.PathLike[str],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    require: bool = False,
    threads: int = 0,
    bands: Sequence[str] | None = None,
    pixel_scale: float | None = None,
) -> Network:
    """Load a network once per process.

    A PipelineTask is constructed for every quantum; the network it needs stays, among the last `MAX_CACHED`
    that were asked for. A file that was replaced since (another time of modification or size) is loaded anew.

    Parameters
    ----------
    name_or_path, providers, require, threads, bands, pixel_scale
        See `Network.load`.

    Returns
    -------
    network : `Network`
        The network.

    Raises
    ------
    NetworkError
        Raised if the artefact is missing, unsound, or does not go with what the caller needs, or is a prior
        (which `Network.load` reads, for comparisons).
    """
    path = resolve(name_or_path).resolve()
    try:
        status = path.stat()
    except OSError as err:
        raise NetworkError(f"{path}: cannot be read: {err}.") from err
    key = (path, status.st_mtime_ns, status.st_size, tuple(providers), require, threads)
    # Threads that ask for one network wait for the one that loads it.
    with _LOCK:
        network = _CACHE.get(key)
        if network is None:
            # What was loaded from an earlier state of the file is of no use any more.
            for old in [k for k in _CACHE if k[0] == path and k[1:3] != key[1:3]]:
                del _CACHE[old]
            network = Network.load(path, providers, require, threads)
            network.metadata.check_deblender()
            _CACHE[key] = network
            while len(_CACHE) > MAX_CACHED:
                _CACHE.popitem(last=False)
        _CACHE.move_to_end(key)
    network.check(bands, pixel_scale)
    return network

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks: what goes into them, what comes out, and which belong together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._files import resolve
from ._metadata import NetworkError
from ._session import Artefact

__all__ = ["Decoder", "Jacobian", "Network", "NetworkOutput", "load_network"]

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
        return self._run(["model"], {"latent": latent}, len(latent), batch_size)[0]


class Jacobian(Artefact):
    """Derivatives of the decoder with respect to the latents.

    Parameters
    ----------
    path : `pathlib.Path`
        The file.
    providers, require, threads
        See `Network.load`.

    Raises
    ------
    NetworkError
        Raised if the file is not a sound Jacobian.
    """

    kind = "jacobian"

    def images(
        self, latent: ArrayLike, psf_moments: ArrayLike, width: int, batch_size: int = 1
    ) -> NDArray[np.float32]:
        """Differentiate observed images, seen through the Gaussian with the PSF's moments.

        Parameters
        ----------
        latent : array_like, (N, L)
            Latent vectors.
        psf_moments : array_like, (N, B, 3)
            Ixx, Iyy, Ixy of the PSF, pixel^2.
        width : `int`
            Width W of the square of pixels about the target's pixel, which has index W // 2 in it.
        batch_size : `int`, optional
            Latents that go through the graph at once; one by one stays in the processor's cache.

        Returns
        -------
        jacobian : `numpy.ndarray`, (N, B, L, W, W)
            Derivatives, nJy.

        Raises
        ------
        NetworkError
            Raised if onnxruntime fails.
        """
        feeds = self._feeds(latent, psf_moments, width)
        return self._run(["image_jacobian"], feeds, len(feeds["latent"]), batch_size)[0]

    def parameters(self, latent: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give what a catalogue wants to know of the models, and its derivatives.

        Parameters
        ----------
        latent : array_like, (N, L)
            Latent vectors.

        Returns
        -------
        parameters : `numpy.ndarray`, (N, B, 6)
            Natural log of the flux in nJy, centroid (x, y) from the target's pixel, and intrinsic second
            moments Ixx, Iyy, Ixy, pixel^2.
        jacobian : `numpy.ndarray`, (N, B, 6, L)
            Derivatives.

        Raises
        ------
        NetworkError
            Raised if onnxruntime fails.
        """
        latent = np.asarray(latent, np.float32)
        moments = np.tile(np.float32([1, 1, 0]), (len(latent), len(self.metadata.bands), 1))
        feeds = self._feeds(latent, moments, 1)
        values, jacobian = self._run(["parameters", "parameter_jacobian"], feeds, len(latent), 128)
        return values, jacobian

    def _feeds(self, latent: ArrayLike, psf_moments: ArrayLike, width: int) -> dict[str, NDArray]:
        line = np.arange(width, dtype=np.float32) - width // 2
        return {
            "latent": np.ascontiguousarray(latent, np.float32),
            "psf_moments": np.ascontiguousarray(psf_moments, np.float32),
            "x": line,
            "y": line,
        }


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
    _jacobian: Jacobian | None = None

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
        """The decoder that belongs to this network, from ``<stem>_decoder.onnx`` beside it (`Decoder`)."""
        if self._decoder is None:
            path = self._companion("decoder")
            if not path.is_file():
                raise NetworkError(f"{self.path}: its decoder {path} does not exist.")
            self._decoder = self._checked(Decoder(path, *self._arguments))
        return self._decoder

    @property
    def jacobian(self) -> Jacobian | None:
        """The decoder's derivatives, from ``<stem>_jacobian.onnx`` beside the network; `None` without one."""
        if self._jacobian is None and self._companion("jacobian").is_file():
            self._jacobian = self._checked(Jacobian(self._companion("jacobian"), *self._arguments))
        return self._jacobian

    def _companion(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.stem}_{kind}.onnx")

    def _checked[Companion: Artefact](self, companion: Companion) -> Companion:
        for key in ("name", "bands", "pixel_scale", "cutout_size", "latent_size", "frame", "centre"):
            mine, other = getattr(self.metadata, key), getattr(companion.metadata, key)
            if mine != other:
                raise NetworkError(
                    f"{companion.path}: its {key} is {other!r}, that of {self.path} is {mine!r}."
                )
        return companion

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
            if name in self._inputs:
                feeds[name] = array
        model, mean, sigma = self._run(["model", "latent_mean", "latent_sigma"], feeds, n, batch_size)
        finite = np.isfinite(mean).all(axis=1) & (np.isfinite(sigma) & (sigma >= 0)).all(axis=1)
        # A sum is not finite if any of its terms is not; it may overflow too, and then the model is no use.
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(model.sum(axis=(1, 2, 3)))
        for array in (model, mean, sigma):
            array[~finite] = 0.0
        return NetworkOutput(model, mean, sigma, finite)


_CACHE: dict[tuple, Network] = {}


def load_network(
    name_or_path: str | os.PathLike[str],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    require: bool = False,
    threads: int = 0,
    bands: Sequence[str] | None = None,
    pixel_scale: float | None = None,
) -> Network:
    """Load a network once per process.

    A PipelineTask is constructed for every quantum; the network it needs stays. A file that was replaced
    since (another time of modification or size) is loaded anew.

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
        Raised if the artefact is missing, unsound, or does not go with what the caller needs.
    """
    path = resolve(name_or_path).resolve()
    status = path.stat()
    key = (path, status.st_mtime_ns, status.st_size, tuple(providers), require, threads)
    network = _CACHE.get(key)
    if network is None:
        # What was loaded from an earlier state of the file is of no use any more.
        for old in [k for k in _CACHE if k[0] == path and k[1:3] != key[1:3]]:
            del _CACHE[old]
        network = _CACHE[key] = Network.load(path, providers, require, threads)
    network.check(bands, pixel_scale)
    return network

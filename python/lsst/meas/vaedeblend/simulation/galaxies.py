# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of galaxies: GalSim profiles, and the bank of rendered components that scenes are made of."""

from __future__ import annotations

__all__ = ["GalaxyBank", "MODEL_SIGMA", "component_profile", "galaxy_profile", "render_bank"]

import dataclasses
import os
from typing import Any

import galsim
import numpy as np

from ..ground.writing import whole_file
from .population import KNOTS, NONE, REAL, STAR, Population, real_catalogue

MODEL_SIGMA = 0.8
"""Width of the model frame's Gaussian PSF, pixel (scarlet's model frame)."""

_GSPARAMS = galsim.GSParams(maximum_fft_size=16384, folding_threshold=5e-3)


def component_profile(population: Population, row: int, component: int) -> galsim.GSObject:
    """One component of one galaxy as a GalSim profile with unit flux.

    Parameters
    ----------
    population : `Population`
    row, component : `int`

    Returns
    -------
    profile : `galsim.GSObject`
        Distances in arcsec.
    """
    p, at = population, (row, component)
    if p.kind[at] == STAR:
        return galsim.DeltaFunction(flux=1.0)
    if p.kind[at] == REAL:
        image = galsim.RealGalaxy(
            real_catalogue(p.catalogue), index=int(-1 - p.source_id[row]), flux=1.0, gsparams=_GSPARAMS
        )
        turned = image.rotate(0.5 * np.arctan2(p.g2[at], p.g1[at]) * galsim.radians)
        return turned.shear(g1=p.shear[row, 0], g2=p.shear[row, 1])
    if p.kind[at] == KNOTS:
        # Twelve knots: enough to look clumpy, few enough that each is seen.
        seed = galsim.BaseDeviate(int(p.source_id[row]) + 1)
        profile = galsim.RandomKnots(12, half_light_radius=p.hlr[at], flux=1.0, rng=seed, gsparams=_GSPARAMS)
    else:
        n = float(p.sersic[at])
        profile = galsim.Sersic(n, half_light_radius=p.hlr[at], flux=1.0, gsparams=_GSPARAMS)
    return profile.shear(g1=p.g1[at], g2=p.g2[at])


def galaxy_profile(population: Population, row: int, band: str) -> galsim.GSObject:
    """A whole galaxy in one band, flux in nJy, distances in arcsec."""
    b = population.bands.index(band)
    parts = [
        component_profile(population, row, c) * float(population.flux[row, c, b])
        for c in np.flatnonzero(population.kind[row] != NONE).tolist()
    ]
    return galsim.Add(parts)


@dataclasses.dataclass
class GalaxyBank:
    """Rendered galaxy components, in the model frame or as one instrument sees them.

    Attributes
    ----------
    bands : `tuple` [`str`]
    pixel_scale : `float`
        arcsec per pixel.
    stamps : `numpy.ndarray`, (M, P, P) float32
        Components of unit total flux; where P is odd, the galaxy's pixel is the middle one.
    first, count : `numpy.ndarray`, (N,) int
        Rows of ``stamps`` that belong to each galaxy.
    flux : `numpy.ndarray`, (M, B) float32
        nJy of each component.
    offset : `numpy.ndarray`, (N, 2) float32
        Position (x, y) of the galaxy's centre from the middle of the stamp, pixel.
    radius : `numpy.ndarray`, (N,) int
        Half-width of the square that holds all but 0.2 percent of the stamp's light.
    area : `numpy.ndarray`, (N,) float32
        Effective area 1 / sum(p^2) of the unit-flux, band-summed image p, pixel^2.
    source_id : `numpy.ndarray`, (N,) int
    made_with : `str`
        Checksum of the configuration that the bank was made with
        (`~lsst.meas.vaedeblend.simulation.banks.bank_checksum`); empty if it was made without one.
    """

    bands: tuple[str, ...]
    pixel_scale: float
    stamps: np.ndarray
    first: np.ndarray
    count: np.ndarray
    flux: np.ndarray
    offset: np.ndarray
    radius: np.ndarray
    area: np.ndarray
    source_id: np.ndarray
    made_with: str = ""

    def __len__(self) -> int:
        return len(self.first)

    def save(self, path: str | os.PathLike) -> None:
        """Write the bank as an npz file, whole or not at all."""
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)}
        with whole_file(path) as part, open(part, "wb") as stream:
            np.savez(stream, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike, made_with: str | None = None) -> GalaxyBank:
        """Read a bank written by `save`; nothing in the file is unpickled.

        Parameters
        ----------
        path : path
        made_with : `str`, optional
            Checksum of the configuration that the bank must have been made with.

        Raises
        ------
        ValueError
            If the bank was made with another configuration.
        """
        with np.load(path, allow_pickle=False) as data:
            made = str(data["made_with"]) if "made_with" in data else ""
            if made_with is not None and made != made_with:
                raise ValueError(
                    f"{path} was made with another configuration ({made[:12] or 'unknown'} instead of "
                    f"{made_with[:12]}): remove it and run `vaedeblend simulate` again, or take another "
                    "directory."
                )
            values = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "made_with"}
        values["bands"] = tuple(str(b) for b in values["bands"])
        values["pixel_scale"] = float(values["pixel_scale"])
        return cls(**values, made_with=made)

    @property
    def total_flux(self) -> np.ndarray:
        """Flux of each galaxy, nJy, shape (N, B)."""
        return np.add.reduceat(self.flux, self.first, axis=0)


def render_bank(
    population: Population,
    pixel_scale: float,
    rng: np.random.Generator,
    *,
    stamp_size: int = 97,
    psf: galsim.GSObject | None = None,
    offset: np.ndarray | None = None,
    merge: bool = False,
    progress=None,
) -> GalaxyBank:
    """Render every component of a population once, by default in the model frame.

    Each galaxy gets an offset within its pixel, uniform in +-0.5,
    if none is given; flips and quarter turns, which are exact on a grid, are
    left to the composition of scenes.

    Parameters
    ----------
    population : `Population`
    pixel_scale : `float`
        arcsec per pixel.
    rng : `numpy.random.Generator`
    stamp_size : `int`
        Number of pixels on a side; odd unless offsets are given.
    psf : `galsim.GSObject`, optional
        PSF, distances in arcsec; the model frame's by default.
    offset : `numpy.ndarray`, (N, 2), optional
        Position (x, y) of each galaxy from the middle of its stamp, pixel.
    merge : `bool`
        Add the components of a galaxy into one, for galaxies without colour gradients.
    progress : callable, optional
        Called with the number of galaxies done.

    Returns
    -------
    bank : `GalaxyBank`

    Raises
    ------
    ValueError
        If the stamp size is even though galaxies are to be placed within the middle pixel.
    """
    if offset is None:
        if stamp_size % 2 == 0:
            raise ValueError(
                f"Stamps need an odd size so that a galaxy has a middle pixel, not {stamp_size}."
            )
        offset = rng.uniform(-0.5, 0.5, (len(population), 2))
    offset = np.asarray(offset, np.float32)
    present = population.kind != NONE
    n = len(population)
    count = np.ones(n, int) if merge else present.sum(axis=1)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    stamps = np.zeros((count.sum(), stamp_size, stamp_size), np.float32)
    if psf is None:
        psf = galsim.Gaussian(sigma=MODEL_SIGMA * pixel_scale, gsparams=_GSPARAMS)
    image = galsim.ImageF(stamp_size, stamp_size, scale=pixel_scale)
    radius = np.full(n, stamp_size // 2)
    area = np.zeros(n, np.float32)
    line = np.arange(stamp_size) - stamp_size // 2
    ring = np.maximum(np.abs(line[:, None]), np.abs(line)).ravel()
    for row in range(n):
        total = np.zeros(stamp_size * stamp_size)
        weights = population.flux[row].sum(axis=-1)
        components = np.flatnonzero(present[row]).tolist()
        parts = [component_profile(population, row, c) for c in components]
        if merge:
            parts = [galsim.Add([p * w for p, w in zip(parts, weights[components], strict=True)])]
            parts[0] /= weights.sum()
            weights = weights.sum(keepdims=True)
            components = [0]
        for k, component in enumerate(components):
            dx, dy = offset[row].astype(float) * pixel_scale
            profile = galsim.Convolve(parts[k], psf).shift(dx, dy)
            profile.drawImage(image=image, method="auto")
            stamps[first[row] + k] = image.array
            total += weights[component] * image.array.ravel()
        area[row] = total.sum() ** 2 / (total**2).sum()
        inside = np.cumsum(np.bincount(ring, weights=total)) / max(total.sum(), 1e-30)
        radius[row] = max(8, int(np.searchsorted(inside, 0.998)))
        if progress is not None and (row + 1) % 500 == 0:
            progress(row + 1)
    return GalaxyBank(
        bands=population.bands,
        pixel_scale=pixel_scale,
        stamps=stamps,
        first=first,
        count=count,
        flux=(population.total_flux if merge else population.flux[present]).astype(np.float32),
        offset=offset,
        radius=np.minimum(radius, stamp_size // 2),
        area=area,
        source_id=population.source_id,
    )

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a deblended source is: its models, and how they are stored.

Models are cutouts of S x S pixels on a corner in scene coordinates, and may hang over the scene's border. A
network gives the shape of a model in each band; its flux is that of the joint solution with its neighbours.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .inference import WIDTHS, Grids
from .network import Decoder, Network
from .rendering import Renderer, SelectedImages, SourceImages, StoredImages
from .scene import PsfGrid

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = ["ParentSummary", "SourceModels"]


@dataclasses.dataclass(eq=False)
class SourceModels:
    """Deblended sources, one row each; a struct of arrays.

    Parameters
    ----------
    bands : `tuple` [`str`]
        Bands in the network's order, which is that of all arrays.
    network : `str`
        Name of the network.
    weights_sha256 : `str`
        Checksum of its graph.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].
    id, parent : `numpy.ndarray`, (N,)
        Identifiers of the sources and of their parents, int64.
    x, y : `numpy.ndarray`, (N,)
        Centroids of the models, scene coordinates.
    peak_x, peak_y : `numpy.ndarray`, (N,)
        The peaks they started from, scene coordinates.
    corner_x, corner_y : `numpy.ndarray`, (N,)
        Scene coordinates of pixel [0, 0] of the sources' squares, int64.
    psf_index : `numpy.ndarray`, (N,)
        Cell of the scene's PSF grid, int64.
    iteration : `numpy.ndarray`, (N,)
        Iteration at which a source was accepted, 0 for those of the start.
    latent_mean, latent_sigma : `numpy.ndarray`, (N, L)
        Approximate posterior of the latents, float32.
    latent_covariance : `numpy.ndarray`, (N, L, L)
        Covariance of the posterior with the neighbours left free, float32; NaN where latents were not refined
        on the pixels, and for models from a table.
    flux, flux_err, flux_network : `numpy.ndarray`, (N, B)
        Total flux of the model and its standard deviation, nJy, NaN where there was nothing to measure it on;
        and the flux that goes with the latents, NaN without a model from the network.
    moments, moments_err : `numpy.ndarray`, (N, B, 3)
        Intrinsic second moments Ixx, Iyy, Ixy of the model, without any PSF and without weight function, and
        their standard deviations, pixel^2; NaN where latents were not refined, and for models from a table.
    images : `SourceImages` or `StoredImages`
        Renders models with the solved flux, in the network's frame and as the coadd shows them.
    flags : `dict` [`str`, `numpy.ndarray`]
        Flags by name, (N,) each; `lsst.meas.vaedeblend.ground.flags.FLAGS` explains them.
    blendedness : `numpy.ndarray`, (N,)
        1 - sum(I_i^2) / sum(I_tot I_i) over the models, bands weighted by their noise.
    data_coverage : `numpy.ndarray`, (N,)
        Part of the model's flux, mean over bands, that lies on valid pixels.
    chi2 : `numpy.ndarray`, (N,)
        Mean over the valid pixels, weighted with the model's share of the flux, of squared residual over
        variance.
    point_probability : `numpy.ndarray`, (N,)
        Probability that the source is unresolved, against the network's galaxies; NaN where a galaxy was
        drawn so large that nobody asked.
    """

    bands: tuple[str, ...]
    network: str
    weights_sha256: str
    origin: tuple[int, int]
    id: NDArray[np.int64]
    parent: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    peak_x: NDArray[np.float64]
    peak_y: NDArray[np.float64]
    corner_x: NDArray[np.int64]
    corner_y: NDArray[np.int64]
    psf_index: NDArray[np.int64]
    iteration: NDArray[np.int64]
    latent_mean: NDArray[np.float32]
    latent_sigma: NDArray[np.float32]
    latent_covariance: NDArray[np.float32]
    flux: NDArray[np.float64]
    flux_err: NDArray[np.float64]
    flux_network: NDArray[np.float64]
    moments: NDArray[np.float32]
    moments_err: NDArray[np.float32]
    images: SourceImages | StoredImages | SelectedImages
    flags: dict[str, NDArray[np.bool_]]
    blendedness: NDArray[np.float64]
    data_coverage: NDArray[np.float64]
    chi2: NDArray[np.float64]
    point_probability: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.id)

    @property
    def model_frame(self) -> NDArray[np.float32]:
        """All models in the network's frame, (N, B, S, S), nJy; rendered anew at each call."""
        return self.images.model_frame()

    @property
    def observed(self) -> NDArray[np.float32]:
        """All models as the coadd shows them, (N, B, S, S), nJy; rendered anew at each call."""
        return self.images.observed()

    def corners(self, rows: ArrayLike | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the places of images that come on squares of one width, that of the largest of them.

        Parameters
        ----------
        rows : array_like, (K,), optional
            Rows of the sources that ``images`` was asked for, all by default.

        Returns
        -------
        corner_y, corner_x : `numpy.ndarray`, (K,)
            Scene coordinates of the images' pixels [0, 0].
        """
        number = np.arange(len(self)) if rows is None else np.atleast_1d(np.asarray(rows, np.int64))
        width = self.images.width[number]
        shift = width // 2 - width.max(initial=self.images.size) // 2
        return self.corner_y[number] + shift, self.corner_x[number] + shift

    def to_table(self) -> Table:
        """Make the table from which the models can be rendered again.

        Returns
        -------
        table : `astropy.table.Table`
            One row per source: identifiers, place in tract pixels, latents, fluxes, and the network by name
            and checksum. A few hundred bytes per row.
        """
        from astropy import units as u
        from astropy.table import Column, Table

        n, bands = len(self), ", ".join(self.bands)
        y0, x0 = self.origin
        nothing = u.dimensionless_unscaled
        columns = [
            ("id", self.id, nothing, "Identifier of the object"),
            ("parent", self.parent, nothing, "Identifier of its parent"),
            ("corner_x", self.corner_x + x0, u.pix, "Tract pixel column of the model's pixel [0, 0]"),
            ("corner_y", self.corner_y + y0, u.pix, "Tract pixel row of the model's pixel [0, 0]"),
            ("width", self.images.width, u.pix, "Width of the square that holds the model"),
            ("x", self.x + x0, u.pix, "Centroid of the model, tract pixel column"),
            ("y", self.y + y0, u.pix, "Centroid of the model, tract pixel row"),
            ("latent_mean", self.latent_mean, nothing, "Latents: mean of the approximate posterior"),
            ("latent_sigma", self.latent_sigma, nothing, "Latents: width of the approximate posterior"),
            ("flux", self.flux.astype(np.float32), u.nJy, f"Flux of the model in the bands {bands}"),
            (
                "flux_network",
                self.flux_network.astype(np.float32),
                u.nJy,
                f"Flux that goes with the latents in the bands {bands}",
            ),
            ("fallback", self._flag("fallback"), nothing, "The model is a point source for want of another"),
            ("point_source", self._flag("point_source"), nothing, "The model is a point source"),
            ("network", np.full(n, self.network), nothing, "Name of the network and of its decoder"),
            ("weights_sha256", np.full(n, self.weights_sha256), nothing, "Checksum of the network's graph"),
        ]
        return Table([Column(d, name=k, unit=unit, description=doc) for k, d, unit, doc in columns])

    def _flag(self, name: str) -> NDArray[np.bool_]:
        return self.flags.get(name, np.zeros(len(self), dtype=bool))

    @classmethod
    def from_table(
        cls,
        table: Table,
        network: Network | Decoder,
        psf: PsfGrid,
        origin: tuple[int, int] = (0, 0),
    ) -> SourceModels:
        """Render models from their table.

        Parameters
        ----------
        table : `astropy.table.Table`
            What `to_table` made.
        network : `Network` or `Decoder`
            The network named in the table, or its decoder.
        psf : `PsfGrid`
            PSFs of the scene in the network's bands.
        origin : `tuple` [`int`], optional
            Tract pixel (y, x) of the scene's pixel [0, 0].

        Returns
        -------
        models : `SourceModels`
            The sources with their images. What the table does not hold is NaN. A source that fell back to
            what the image holds comes back as a point source of its flux.

        Raises
        ------
        ValueError
            Raised if the table was made with another network, lacks a column, or has values of another kind
            in one, or positions that are not finite.
        """
        try:
            return cls._from_table(table, network, psf, origin)
        except (KeyError, TypeError, OverflowError) as error:
            # Tables come from files, and columns may be missing or of any type.
            raise ValueError(f"This is no table of models: {type(error).__name__}: {error}") from error

    @classmethod
    def _from_table(
        cls, table: Table, network: Network | Decoder, psf: PsfGrid, origin: tuple[int, int]
    ) -> SourceModels:
        decoder = network.decoder if isinstance(network, Network) else network
        expected = {"network": decoder.metadata.name}
        # A decoder does not know the checksum of its deblender's graph.
        if isinstance(network, Network):
            expected["weights_sha256"] = network.metadata.weights_sha256
        for column, mine in expected.items():
            found = sorted({str(value) for value in table[column]})
            if found not in ([], [mine]):
                raise ValueError(f"The table was made with {column} {found}, this one is {mine!r}.")
        n, bands = len(table), decoder.metadata.bands
        y0, x0 = origin
        x, y = np.asarray(table["x"], float) - x0, np.asarray(table["y"], float) - y0
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("A position in the table of models is not finite.")
        corner_x = np.asarray(table["corner_x"], np.int64) - x0
        corner_y = np.asarray(table["corner_y"], np.int64) - y0
        size = decoder.metadata.cutout_size
        # Tables of earlier versions know neither larger squares nor point sources.
        width = np.full(n, size)
        if "width" in table.colnames:
            width = np.asarray(table["width"], np.int64)
            if n and not np.isin(width, (size, *(w for w in WIDTHS if w > size))).all():
                raise ValueError(f"The table has models of widths {np.unique(width).tolist()}.")
        start_x, start_y = (c + width // 2 - size // 2 for c in (corner_x, corner_y))
        centre_y, centre_x = decoder.metadata.centre
        psf_index = psf.index(start_x + centre_x, start_y + centre_y)
        latent = np.asarray(table["latent_mean"], np.float32).reshape(n, decoder.metadata.latent_size)
        flux = np.asarray(table["flux"], float).reshape(n, len(bands))
        fallback = np.asarray(table["fallback"], bool)
        known = "point_source" in table.colnames
        point_source = np.asarray(table["point_source"], bool) if known else np.zeros(n, bool)
        point = fallback | point_source
        renderer = Renderer(decoder.metadata, psf)
        rows = np.flatnonzero(point)
        dx, dy = (x - start_x - centre_x)[rows], (y - start_y - centre_y)[rows]
        templates = renderer.point_templates(rows, dx, dy, psf_index[rows], flux[rows], width[rows])
        flux_network = np.full(flux.shape, np.nan)
        if "flux_network" in table.colnames:
            flux_network = np.asarray(table["flux_network"], float).reshape(flux.shape)
        grids = None
        if isinstance(network, Network) and network.can_fit:
            grids = Grids(network.render, None, renderer.psf.stamps, renderer.psf.moments)
        elif (width[~point] > size).any():
            raise ValueError("A decoder alone draws no models that are larger than its cutout.")
        images = SourceImages(
            decoder, grids, renderer, latent, psf_index, flux, flux_network, width, templates
        )
        nothing = np.full(n, np.nan)
        return cls(
            bands=bands,
            network=decoder.metadata.name,
            weights_sha256=str(table["weights_sha256"][0]) if n else "",
            origin=(int(y0), int(x0)),
            id=np.asarray(table["id"], np.int64),
            parent=np.asarray(table["parent"], np.int64),
            x=x,
            y=y,
            peak_x=nothing,
            peak_y=nothing.copy(),
            corner_x=corner_x,
            corner_y=corner_y,
            psf_index=psf_index,
            iteration=np.zeros(n, np.int64),
            latent_mean=latent,
            latent_sigma=np.asarray(table["latent_sigma"], np.float32).reshape(latent.shape),
            latent_covariance=np.full((*latent.shape, latent.shape[1]), np.nan, np.float32),
            flux=flux,
            flux_err=np.full(flux.shape, np.nan),
            flux_network=flux_network,
            moments=np.full((*flux.shape, 3), np.nan, np.float32),
            moments_err=np.full((*flux.shape, 3), np.nan, np.float32),
            images=images,
            flags={"fallback": fallback, "point_source": point_source},
            blendedness=nothing.copy(),
            data_coverage=nothing.copy(),
            chi2=nothing.copy(),
            point_probability=nothing.copy(),
        )


@dataclasses.dataclass(eq=False)
class ParentSummary:
    """What happened to the parents, one row each; a struct of arrays.

    Parameters
    ----------
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].
    id : `numpy.ndarray`, (M,)
        Identifiers, int64.
    x0, y0, width, height : `numpy.ndarray`, (M,)
        Bounding box of the footprint, scene coordinates, pixel.
    area : `numpy.ndarray`, (M,)
        Pixels of the footprint.
    n_peaks : `numpy.ndarray`, (M,)
        Peaks that were given, or found to start from.
    n_child : `numpy.ndarray`, (M,)
        Sources with a model that it has in the end.
    iterations : `numpy.ndarray`, (M,)
        Times its members went through the network.
    n_pixels : `numpy.ndarray`, (M,)
        Valid pixels of the footprint, summed over bands.
    chi2_start, chi2 : `numpy.ndarray`, (M,)
        Sum over these pixels of squared image over variance, before and after subtracting the models.
    flags : `dict` [`str`, `numpy.ndarray`]
        Flags by name, (M,) each; `lsst.meas.vaedeblend.ground.flags.FLAGS` explains them.
    """

    origin: tuple[int, int]
    id: NDArray[np.int64]
    x0: NDArray[np.int64]
    y0: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    area: NDArray[np.int64]
    n_peaks: NDArray[np.int64]
    n_child: NDArray[np.int64]
    iterations: NDArray[np.int64]
    n_pixels: NDArray[np.int64]
    chi2_start: NDArray[np.float64]
    chi2: NDArray[np.float64]
    flags: dict[str, NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.id)

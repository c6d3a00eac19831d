# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Columns and units of the output tables; their flags are in `lsst.meas.vaedeblend.ground.flags`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .ground.bands import reference_band
from .ground.flags import PARENT_FLAGS, SKIP_FLAGS, SOURCE_FLAGS
from .sources import ParentSummary, SourceModels

if TYPE_CHECKING:
    from astropy.table import Table

    from .posterior import Posterior

__all__ = ["Box", "Sky", "flag_tracts", "join_patches", "models_table", "object_table", "parent_table"]

Sky = Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]
"""A sky projection: tract pixels (x, y) to right ascension and declination, degree."""

Box = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last, tract pixel."""

PATCH_INNER, TRACT_INNER, PRIMARY = "detect_isPatchInner", "detect_isTractInner", "detect_isPrimary"


def _table(columns: list[tuple[str, NDArray, str, str]]) -> Table:
    """Make a table of (name, values, unit, description); the unit is "" where there is none."""
    from astropy import units as u
    from astropy.table import Column, Table

    return Table([Column(d, name=k, unit=u.Unit(unit), description=doc) for k, d, unit, doc in columns])


def object_table(
    sources: SourceModels,
    parents: ParentSummary,
    sky: Sky | None = None,
    band: str | None = None,
    posterior: Posterior | None = None,
    inner: Box | None = None,
) -> Table:
    """Make the catalogue of deblended objects.

    Parameters
    ----------
    sources : `SourceModels`
        The sources.
    parents : `ParentSummary`
        Their parents.
    sky : callable, optional
        Takes arrays of tract pixels x, y to arrays of right ascension and declination, degree. Without it
        there are no coordinates on the sky.
    band : `str`, optional
        Band in which shapes are measured, by default that of the posterior or of `reference_band`.
    posterior : `lsst.meas.vaedeblend.posterior.Posterior`, optional
        Fluxes, shapes and their errors over the posterior. Without it errors of fluxes are those of the joint
        solution, and shapes in the network's frame have none.
    inner : `tuple` [`int`], optional
        Inner region of the patch: patches overlap, inner regions share the tract out. Without it there is no
        column ``detect_isPatchInner``.

    Returns
    -------
    table : `astropy.table.Table`
        One row per source, every column with unit and description.

    Raises
    ------
    ValueError
        Raised if the sources have no such band, the posterior's shapes are of another, or a source's parent
        is not among the parents.
    """
    n, (y0, x0) = len(sources), sources.origin
    if band is None:
        band = reference_band(sources.bands) if posterior is None else posterior.shape_band
    if band not in sources.bands:
        raise ValueError(f"The sources have bands {list(sources.bands)}, none is {band!r}.")
    if posterior is not None and posterior.shape_band != band:
        raise ValueError(f"The posterior has shapes in {posterior.shape_band}, not in {band}.")
    index = {int(number): i for i, number in enumerate(parents.id)}
    lost = sorted(set(sources.parent.tolist()) - set(index))
    if lost:
        raise ValueError(f"The parents {lost} of some sources are not among the {len(parents)} parents.")
    of_parent = np.array([index[int(number)] for number in sources.parent], dtype=np.int64)
    x, y = sources.x + x0, sources.y + y0
    columns: list[tuple[str, NDArray, str, str]] = [
        ("id", sources.id, "", "Identifier of the object"),
        ("parent", sources.parent, "", "Identifier of its parent"),
        ("x", x, "pix", "Centroid of the model, tract pixel column"),
        ("y", y, "pix", "Centroid of the model, tract pixel row"),
    ]
    if sky is not None:
        ra, dec = sky(x, y)
        columns += [
            ("coord_ra", np.asarray(ra, float), "deg", "Right ascension of the centroid (ICRS)"),
            ("coord_dec", np.asarray(dec, float), "deg", "Declination of the centroid (ICRS)"),
        ]
    flux, flux_err = sources.flux, sources.flux_err
    moments, moments_err = None, np.full((n, 3), np.nan)
    if posterior is not None:
        flux, flux_err = posterior.flux, posterior.flux_err
        moments, moments_err = posterior.shape, posterior.shape_err
    if moments is None:
        moments = sources.images.shapes(sources.bands.index(band))
    for i, name in enumerate(sources.bands):
        columns += [
            (
                f"{name}_flux",
                flux[:, i],
                "nJy",
                f"Flux of the model in {name}, fitted with its siblings",
            ),
            (f"{name}_fluxErr", flux_err[:, i], "nJy", f"Standard deviation of the flux in {name}"),
            (
                f"{name}_fluxNetwork",
                sources.flux_network[:, i],
                "nJy",
                f"Flux that goes with the latents in {name}",
            ),
        ]
    with np.errstate(invalid="ignore", divide="ignore"):
        size = moments[:, 0] + moments[:, 1]
        e1, e2 = (moments[:, 0] - moments[:, 1]) / size, 2 * moments[:, 2] / size
    where = f"of the model in {band}, in the network's frame"
    width = sources.latent_sigma.astype(float)
    columns += [
        ("shape_xx", moments[:, 0], "pix2", f"Adaptive second moment Ixx {where}"),
        ("shape_yy", moments[:, 1], "pix2", f"Adaptive second moment Iyy {where}"),
        ("shape_xy", moments[:, 2], "pix2", f"Adaptive second moment Ixy {where}"),
        ("shape_xxErr", moments_err[:, 0], "pix2", "Standard deviation of shape_xx over the posterior"),
        ("shape_yyErr", moments_err[:, 1], "pix2", "Standard deviation of shape_yy over the posterior"),
        ("shape_xyErr", moments_err[:, 2], "pix2", "Standard deviation of shape_xy over the posterior"),
        ("shape_e1", e1, "", f"Ellipticity (Ixx - Iyy) / (Ixx + Iyy) {where}"),
        ("shape_e2", e2, "", f"Ellipticity 2 Ixy / (Ixx + Iyy) {where}"),
    ]
    b = sources.bands.index(band)
    for k, name in enumerate(("xx", "yy", "xy")):
        what = f"intrinsic second moment I{name} of the model in {band}, without PSF and weight function"
        columns += [
            (
                f"shape_intrinsic_{name}",
                sources.moments[:, b, k].astype(float),
                "pix2",
                what[0].upper() + what[1:],
            ),
            (
                f"shape_intrinsic_{name}Err",
                sources.moments_err[:, b, k].astype(float),
                "pix2",
                f"Standard deviation of the {what}",
            ),
        ]
    if inner is not None:
        # The peak and not the centroid decides: patches fit an object within other neighbourhoods. Pixel n
        # covers n - 0.5 to n + 0.5, and what is on a border belongs to one side.
        row, column = np.floor(sources.peak_y + y0 + 0.5), np.floor(sources.peak_x + x0 + 0.5)
        inside = (row >= inner[0]) & (row < inner[1]) & (column >= inner[2]) & (column < inner[3])
        columns.append((PATCH_INNER, inside, "", "The peak is in the patch's inner region"))
    columns += [
        (
            "deblend_posteriorWidth",
            width.mean(axis=1),
            "",
            "Mean width of the posterior over the latents",
        ),
        ("deblend_posteriorWidthMax", width.max(axis=1, initial=0), "", "Largest width of the posterior"),
        ("deblend_peak_center_x", sources.peak_x + x0, "pix", "The peak, tract pixel column"),
        ("deblend_peak_center_y", sources.peak_y + y0, "pix", "The peak, tract pixel row"),
        ("deblend_iteration", sources.iteration, "", "Iteration that accepted the source; 0 for first peaks"),
        (
            "deblend_iterations",
            parents.iterations[of_parent],
            "",
            "Times the parent went through the network",
        ),
        ("deblend_nPeaks", parents.n_peaks[of_parent], "", "Peaks that the parent started from"),
        ("deblend_nChild", parents.n_child[of_parent], "", "Sources with a model that the parent has"),
        ("deblend_chi2", sources.chi2, "", "Mean of squared residual over variance, weighted with the model"),
        (
            "deblend_blendedness",
            sources.blendedness,
            "",
            "Blendedness 1 - sum(I_i^2) / sum(I_tot I_i) over the models",
        ),
        (
            "deblend_pointProbability",
            sources.point_probability,
            "",
            "Probability that the source is unresolved; NaN where its galaxy was drawn too large to ask",
        ),
        (
            "deblend_significance",
            _significance(sources),
            "",
            "Root of the sum over bands of squared flux over standard deviation",
        ),
        ("deblend_dataCoverage", sources.data_coverage, "", "Part of the model's flux on valid pixels"),
    ]
    for name, doc in SOURCE_FLAGS.items():
        value = sources.flags.get(name, np.zeros(n, dtype=bool))
        columns.append((f"deblend_flag_{name}", value, "", doc))
    return _table(columns)


def _significance(sources: SourceModels) -> NDArray[np.float64]:
    """Significance of sources over all bands, (N,); NaN without a flux in any."""
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = (sources.flux / sources.flux_err) ** 2
    return np.where(np.isfinite(squares).any(axis=1), np.sqrt(np.nansum(squares, axis=1)), np.nan)


def parent_table(parents: ParentSummary, sky: Sky | None = None) -> Table:
    """Make the catalogue of parents.

    Parameters
    ----------
    parents : `ParentSummary`
        The parents.
    sky : callable, optional
        Takes arrays of tract pixels x, y to arrays of right ascension and declination, degree.

    Returns
    -------
    table : `astropy.table.Table`
        One row per parent, every column with unit and description.
    """
    n, (y0, x0) = len(parents), parents.origin
    x = parents.x0 + x0 + (parents.width - 1) / 2.0
    y = parents.y0 + y0 + (parents.height - 1) / 2.0
    columns: list[tuple[str, NDArray, str, str]] = [
        ("id", parents.id, "", "Identifier of the parent"),
        ("x", x, "pix", "Middle of the footprint's bounding box, tract pixel column"),
        ("y", y, "pix", "Middle of the footprint's bounding box, tract pixel row"),
    ]
    if sky is not None:
        ra, dec = sky(x, y)
        columns += [
            ("coord_ra", np.asarray(ra, float), "deg", "Right ascension of that position (ICRS)"),
            ("coord_dec", np.asarray(dec, float), "deg", "Declination of that position (ICRS)"),
        ]
    columns += [
        ("bbox_x0", parents.x0 + x0, "pix", "First tract pixel column of the bounding box"),
        ("bbox_y0", parents.y0 + y0, "pix", "First tract pixel row of the bounding box"),
        ("bbox_width", parents.width, "pix", "Width of the bounding box"),
        ("bbox_height", parents.height, "pix", "Height of the bounding box"),
        ("area", parents.area, "pix2", "Area of the footprint"),
        ("deblend_nPeaks", parents.n_peaks, "", "Peaks that were given, or found to start from"),
        ("deblend_nChild", parents.n_child, "", "Sources with a model that it has"),
        ("deblend_iterations", parents.iterations, "", "Times its members went through the network"),
        ("deblend_nPixels", parents.n_pixels, "", "Valid pixels of the footprint, summed over bands"),
        ("deblend_chi2_start", parents.chi2_start, "", "Sum over them of squared image over variance"),
        ("deblend_chi2", parents.chi2, "", "Sum over them of squared residual over variance"),
    ]
    skipped = {
        name: (parents.flags.get(f"skipped_{name}", np.zeros(n, dtype=bool)), doc)
        for name, doc in SKIP_FLAGS.items()
    }
    any_reason = np.any([value for value, _ in skipped.values()], axis=0)
    columns.append(("deblend_skipped", any_reason, "", "The parent was not deblended and has no objects"))
    columns += [(f"deblend_skipped_{name}", value, "", doc) for name, (value, doc) in skipped.items()]
    for name, doc in PARENT_FLAGS.items():
        value = parents.flags.get(name, np.zeros(n, dtype=bool))
        columns.append((f"deblend_flag_{name}", value, "", doc))
    return _table(columns)


def models_table(sources: SourceModels) -> Table:
    """Make the table from which the models can be rendered again.

    Parameters
    ----------
    sources : `SourceModels`
        The sources.

    Returns
    -------
    table : `astropy.table.Table`
        One row per source, every column with unit and description; see `SourceModels.to_table`.
    """
    return sources.to_table()


def join_patches(tables: Sequence[Table]) -> Table:
    """Join the catalogues of the patches of a tract.

    Parameters
    ----------
    tables : sequence of `astropy.table.Table`
        What `object_table` made with ``inner``, of different patches.

    Returns
    -------
    table : `astropy.table.Table`
        All rows, sorted by identifier, whatever the order of the patches. ``detect_isPrimary`` is set for one
        of the objects that several patches have of one peak, if it has a flux in any band.

    Raises
    ------
    ValueError
        Raised if there is no table, one has no ``detect_isPatchInner``, columns differ, or an identifier is
        there twice.
    """
    from astropy.table import Column, vstack

    if not tables:
        raise ValueError("There is no catalogue to join.")
    for table in tables:
        if PATCH_INNER not in table.colnames or table.colnames != tables[0].colnames:
            raise ValueError(
                f"Catalogues to join need the same columns with {PATCH_INNER}: {tables[0].colnames}, "
                f"{table.colnames}."
            )
    joined = vstack(list(tables), join_type="exact", metadata_conflicts="silent")
    order = np.argsort(np.asarray(joined["id"]), kind="stable")
    joined = joined[order]
    if (np.diff(np.asarray(joined["id"])) == 0).any():
        raise ValueError("A patch is among the catalogues twice: identifiers are not unique.")
    fluxes = [np.asarray(joined[name]) for name in joined.colnames if name.endswith("_flux")]
    primary = np.asarray(joined[PATCH_INNER]) & np.any(np.isfinite(fluxes), axis=0)
    doc = "The one to use of several entries of an object: in inner regions, with a model"
    joined.add_column(
        Column(primary, name=PRIMARY, unit="", description=doc), index=joined.colnames.index(PATCH_INNER) + 1
    )
    return joined


def flag_tracts(table: Table, tract: int, centres: Mapping[int, tuple[float, float]]) -> Table:
    """Flag the objects of a tract that are nearer to the centre of another.

    Tracts overlap too. Every position is nearest to one centre, so each object is in the inner region of one
    tract; ring sky maps cut between tracts elsewhere, and in the stack their own cut is used.

    Parameters
    ----------
    table : `astropy.table.Table`
        What `join_patches` made, with coordinates.
    tract : `int`
        Its tract.
    centres : mapping of `int` to `tuple` [`float`, `float`]
        Right ascension and declination of the centres of tracts, degree.

    Returns
    -------
    table : `astropy.table.Table`
        A copy with ``detect_isTractInner``, and ``detect_isPrimary`` set only there.

    Raises
    ------
    ValueError
        Raised if the tract has no centre, or the table no coordinates or no ``detect_isPrimary``.
    """
    from astropy.table import Column

    lacking = {PRIMARY, "coord_ra", "coord_dec"} - set(table.colnames)
    if tract not in centres or lacking:
        raise ValueError(f"Tract {tract} among the centres of {sorted(centres)}; columns lacking: {lacking}.")
    # In the order of their numbers, so that a tie has one winner whatever tract asks.
    tracts = sorted(centres)
    ra, dec = np.radians(np.array([centres[t] for t in tracts], float)).T
    x, y = np.radians(np.asarray(table["coord_ra"])), np.radians(np.asarray(table["coord_dec"]))
    chords = (
        np.sin((y[:, None] - dec) / 2) ** 2
        + np.cos(y[:, None]) * np.cos(dec) * np.sin((x[:, None] - ra) / 2) ** 2
    )
    inner = np.array(tracts)[chords.argmin(axis=1)] == tract
    out = table.copy()
    doc = "No other tract's centre is nearer"
    out.add_column(
        Column(inner, name=TRACT_INNER, unit="", description=doc), index=out.colnames.index(PRIMARY)
    )
    out[PRIMARY] = np.asarray(out[PRIMARY]) & inner
    return out

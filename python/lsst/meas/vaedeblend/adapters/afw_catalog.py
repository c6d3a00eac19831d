# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Deblended sources as the catalogues that the stack's measurement tasks read. Needs afw.

The columns are those of scarlet's task, and then what only this deblender knows: the posterior and the flags
of each source, which the measurement tasks copy into their own catalogues.
"""

from __future__ import annotations

__all__ = [
    "CatalogSchemas",
    "MergedParent",
    "copy_mapper",
    "empty_catalog",
    "posterior_column",
    "read_parents",
    "write_objects",
    "write_parents",
]

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lsst.afw.detection import PeakTable
from lsst.afw.table import SchemaMapper, SourceCatalog, SourceTable
from numpy.typing import NDArray

from ..deblender import DeblendResult
from ..ground.flags import SKIP_FLAGS, SOURCE_FLAGS
from ..posterior import Posterior
from ..scene import Parent
from .afw_scene import parent_from_footprint

if TYPE_CHECKING:
    from lsst.afw.detection import Footprint, PeakRecord
    from lsst.afw.table import IdFactory, Schema

# Name, type, unit and meaning of what scarlet's task adds to objects; measurement fills in the second half.
_OBJECT_FIELDS: tuple[tuple[str, str, str, str], ...] = (
    ("deblend_peak_center_x", "I", "pixel", "Column of the peak that the object comes from"),
    ("deblend_peak_center_y", "I", "pixel", "Row of the peak that the object comes from"),
    ("deblend_peakId", "I", "", "Identifier of that peak in its parent's footprint"),
    ("deblend_nChild", "I", "", "Number of children: objects have none"),
    (
        "deblend_blendId",
        "L",
        "",
        "Identifier of the blend that the object is from; 0 for isolated ones",
    ),
    ("deblend_blendNChild", "I", "", "Number of objects in that blend; 0 for isolated ones"),
    ("deblend_parentNPeaks", "I", "", "deblend_nPeaks of the parent; 0 for isolated objects"),
    ("deblend_parentNChild", "I", "", "deblend_nChild of the parent; 0 for isolated objects"),
    ("deblend_nComponents", "I", "", "Number of components that the model is stored as"),
    ("deblend_chi2", "F", "", "Mean of squared residual over variance, weighted with the model"),
    (
        "deblend_edgePixels",
        "Flag",
        "",
        "The peak is close to the image's border or to pixels marked EDGE",
    ),
    ("deblend_peak_instFlux", "D", "count", "Deblended image at the peak"),
    ("deblend_scarletFlux", "F", "", "Sum of the model, in units of the image"),
    ("deblend_dataCoverage", "F", "", "Part of the deblended footprint's pixels that have data"),
    ("deblend_zeroFlux", "Flag", "", "The model has no flux in this band"),
    ("deblend_maxOverlap", "F", "", "Largest value of the neighbours' models on the object's own"),
    ("deblend_fluxOverlap", "F", "", "Flux of the neighbours' models on the object's own"),
    ("deblend_fluxOverlapFraction", "F", "", "The same over the flux of the object's own model"),
    ("deblend_blendedness", "F", "", "Blendedness (Bosch et al. 2018) of the models in this band"),
)

_PARENT_FIELDS: tuple[tuple[str, str, str, str], ...] = (
    ("deblend_runtime", "F", "ms", "Not known: all parents of a patch are deblended together"),
    ("deblend_iterations", "I", "", "Times that the parent's members went through the network"),
    ("deblend_nChild", "I", "", "Number of objects that the parent was split into; 0 if it was not"),
    ("deblend_nPeaks", "I", "", "Number of peaks in the merged detection"),
    ("deblend_nComponents", "I", "", "Number of components that the children's models are stored as"),
    ("deblend_chi2", "F", "", "Sum of squared residual over variance, divided by the number of pixels"),
    ("deblend_skipped", "Flag", "", "The parent has several peaks and was not deblended"),
    ("deblend_skipped_isolatedParent", "Flag", "", "The parent is one object, which was not split"),
    ("deblend_skipped_isPseudo", "Flag", "", "The parent is a pseudo source, such as a sky object"),
    *((f"deblend_skipped_{name}", "Flag", "", doc) for name, doc in SKIP_FLAGS.items()),
    ("deblend_spectrumInitFlag", "Flag", "", "Not used: spectra are always solved for"),
    ("deblend_blendConvergenceFailedFlag", "Flag", "", "The iteration limit came before convergence"),
    ("deblend_failed", "Flag", "", "None of the objects has a model from the network"),
    ("deblend_childFailed", "Flag", "", "An object has no model from the network"),
    ("deblend_error", "String", "", "Not used: an error that is not an object's ends the task"),
    ("deblend_incompleteData", "Flag", "", "Some pixels are masked in a band, or a band has no PSF"),
)

_ERROR_LENGTH = 25

# Significance in a band that makes a peak which the deblender found one that was detected in it.
_DETECTED = 5.0


def posterior_column(*parts: str) -> str:
    """Name a column of the posterior.

    Parameters
    ----------
    *parts : `str`
        ``flux`` or ``fluxErr`` and a band, ``shape`` or ``shapeErr`` and ``xx``, ``yy`` or ``xy``, or
        ``flag`` and a flag's name.

    Returns
    -------
    name : `str`
        The name.
    """
    return "_".join(("deblend_posterior", *parts))


def _posterior_fields(bands: Sequence[str], shape_band: str) -> Iterable[tuple[str, str, str, str]]:
    for band in bands:
        yield (
            posterior_column("flux", band),
            "D",
            "nJy",
            f"Flux of the model in {band}, solved for with its neighbours",
        )
        yield (
            posterior_column("fluxErr", band),
            "D",
            "nJy",
            "Its standard deviation, with that of the posterior over shapes",
        )
    for moment in ("xx", "yy", "xy"):
        where = f"of the model in {shape_band}, in the network's frame"
        yield (
            posterior_column("shape", moment),
            "D",
            "pixel^2",
            f"Adaptive second moment I{moment} {where}",
        )
        yield (
            posterior_column("shapeErr", moment),
            "D",
            "pixel^2",
            "Its standard deviation over the posterior",
        )
    for name, doc in SOURCE_FLAGS.items():
        yield posterior_column("flag", name), "Flag", "", doc


def _add_fields(schema: Schema, fields: Iterable[tuple[str, str, str, str]]) -> None:
    for name, kind, unit, doc in fields:
        size = {"size": _ERROR_LENGTH} if kind == "String" else {}
        schema.addField(name, type=kind, doc=doc, units=unit, **size)


def copy_mapper(schema: Schema) -> SchemaMapper:
    """Make a mapper that copies all columns.

    Parameters
    ----------
    schema : `lsst.afw.table.Schema`
        The schema to copy from.

    Returns
    -------
    mapper : `lsst.afw.table.SchemaMapper`
        The mapper; columns may be added to its output schema.
    """
    mapper = SchemaMapper(schema)
    mapper.addMinimalSchema(schema, True)
    return mapper


def empty_catalog(schema: Schema, id_factory: IdFactory | None = None) -> SourceCatalog:
    """Make an empty catalogue.

    Parameters
    ----------
    schema : `lsst.afw.table.Schema`
        Its schema.
    id_factory : `lsst.afw.table.IdFactory`, optional
        Gives its records their ids; by default they are counted.

    Returns
    -------
    catalog : `lsst.afw.table.SourceCatalog`
        The catalogue.
    """
    if id_factory is None:
        return SourceCatalog(SourceTable.make(schema))
    return SourceCatalog(SourceTable.make(schema, id_factory))


class CatalogSchemas:
    """Schemas of the objects and of the parents.

    Parameters
    ----------
    schema : `lsst.afw.table.Schema`
        Schema of the merged detections. It becomes that of the objects: columns are added to it in place.
    peak_schema : `lsst.afw.table.Schema` or `None`
        Schema of their peaks, whose columns beyond the minimal ones objects get as well.
    bands : sequence of `str`
        Bands of the network.
    shape_band : `str`
        Band of the shapes.

    Attributes
    ----------
    objects, parents : `lsst.afw.table.Schema`
        The schemas.
    peak_names, copied_names : `list` [`str`]
        Columns of objects that come from their peaks, and from the merged detection.
    bands : `tuple` [`str`]
        Bands of the network.
    """

    def __init__(
        self, schema: Schema, peak_schema: Schema | None, bands: Sequence[str], shape_band: str
    ) -> None:
        self.bands = tuple(bands)
        minimal = PeakTable.makeMinimalSchema()
        self.peak_names: list[str] = []
        for item in () if peak_schema is None else peak_schema:
            if item.field.getName() not in minimal.getNames():
                schema.addField(item.field)
                self.peak_names.append(item.field.getName())
        self._mapper = copy_mapper(schema)
        self.copied_names = [n for n in schema.getNames() if n.startswith("merge_footprint_")]
        _add_fields(self._mapper.editOutputSchema(), _PARENT_FIELDS)
        self.parents: Schema = self._mapper.getOutputSchema()
        _add_fields(schema, _OBJECT_FIELDS)
        _add_fields(schema, _posterior_fields(bands, shape_band))
        self.objects: Schema = schema

    def parent_catalog(self, merged: SourceCatalog) -> SourceCatalog:
        """Copy merged detections into a catalogue with the columns of parents."""
        catalog = empty_catalog(self.parents)
        catalog.reserve(len(merged))
        catalog.extend(merged, self._mapper)
        return catalog

    def object_catalog(self, size: int) -> SourceCatalog:
        """Make a catalogue with so many empty records, contiguous in memory."""
        catalog = empty_catalog(self.objects)
        catalog.reserve(size)
        for _ in range(size):
            catalog.addNew()
        return catalog


@dataclasses.dataclass(eq=False)
class MergedParent:
    """A merged detection and what becomes of it.

    Parameters
    ----------
    id : `int`
        Identifier of the merged detection.
    footprint : `lsst.afw.detection.Footprint`
        Its footprint.
    peaks : `list` [`lsst.afw.detection.PeakRecord`]
        Its peaks, without those of pseudo sources unless it is one itself.
    parent : `lsst.meas.vaedeblend.scene.Parent`
        The same for the deblender.
    pseudo : `bool`
        Whether it is a pseudo source.
    skipped : `str` or `None`
        Why it is not deblended, a key of `lsst.meas.vaedeblend.ground.flags.SKIP_FLAGS`.
    row : `int` or `None`
        Row of the deblender's parents.
    sources : `numpy.ndarray`
        Rows of the deblender's sources.
    """

    id: int
    footprint: Footprint
    peaks: list[PeakRecord]
    parent: Parent
    pseudo: bool
    skipped: str | None = None
    row: int | None = None
    sources: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def isolated(self) -> bool:
        """Whether it passes into the objects as it is (`bool`)."""
        return self.skipped is None and len(self.sources) < 2

    @property
    def blend(self) -> bool:
        """Whether it was split (`bool`)."""
        return self.skipped is None and len(self.sources) > 1


def read_parents(
    merged: SourceCatalog, origin: tuple[int, int], pseudo_columns: Sequence[str]
) -> list[MergedParent]:
    """Read merged detections.

    Parameters
    ----------
    merged : `lsst.afw.table.SourceCatalog`
        The merged detections with their footprints.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].
    pseudo_columns : sequence of `str`
        Columns, of detections or of peaks, that mark pseudo sources; others than there are do no harm.

    Returns
    -------
    parents : `list` [`MergedParent`]
        Those detections that have a pixel, ordered by id.
    """
    columns = [name for name in pseudo_columns if name in merged.schema.getNames()]
    out = []
    for record in sorted(merged, key=lambda r: r.getId()):
        footprint = record.getFootprint()
        if footprint.getArea() == 0:
            continue
        peaks = list(footprint.peaks)
        names = set(footprint.peaks.schema.getNames()) & set(pseudo_columns)
        marked = [any(peak[name] for name in names) for peak in peaks]
        pseudo = any(record[name] for name in columns) or (bool(peaks) and all(marked))
        if not pseudo:
            peaks = [peak for peak, mark in zip(peaks, marked, strict=True) if not mark]
        xy = np.array([[peak.getFx(), peak.getFy()] for peak in peaks])
        parent = parent_from_footprint(record.getId(), footprint, xy, origin)
        out.append(MergedParent(record.getId(), footprint, peaks, parent, pseudo))
    return out


def write_parents(
    schemas: CatalogSchemas,
    merged: SourceCatalog,
    families: Sequence[MergedParent],
    result: DeblendResult | None,
    components: dict[int, int],
    missing_psf: bool,
) -> SourceCatalog:
    """Make the catalogue of parents.

    Parameters
    ----------
    schemas : `CatalogSchemas`
        The schemas.
    merged : `lsst.afw.table.SourceCatalog`
        The merged detections.
    families : sequence of `MergedParent`
        What became of them.
    result : `lsst.meas.vaedeblend.deblender.DeblendResult` or `None`
        Result of the deblender, if there was anything to deblend.
    components : `dict` [`int`, `int`]
        Number of components of each child's model by its id.
    missing_psf : `bool`
        Whether some band has no PSF.

    Returns
    -------
    catalog : `lsst.afw.table.SourceCatalog`
        One record per merged detection.
    """
    catalog = schemas.parent_catalog(merged)
    by_id = {family.id: family for family in families}
    for record in catalog:
        family = by_id.get(record.getId())
        if family is None:
            continue
        record["deblend_nPeaks"] = len(family.peaks)
        if family.peaks:
            _copy(family.peaks[0], record, schemas.peak_names)
        record["deblend_skipped_isPseudo"] = family.pseudo
        record["deblend_skipped_isolatedParent"] = family.isolated and not family.pseudo
        if family.skipped is not None:
            record["deblend_skipped"] = True
            record[f"deblend_skipped_{family.skipped}"] = True
        if family.row is None:
            continue
        assert result is not None
        parents, row, sources = result.parents, family.row, result.sources
        record["deblend_iterations"] = int(parents.iterations[row])
        if parents.n_pixels[row]:
            record["deblend_chi2"] = parents.chi2[row] / parents.n_pixels[row]
        failed = sources.flags["fallback"][family.sources]
        record["deblend_failed"] = bool(len(failed)) and bool(failed.all())
        record["deblend_childFailed"] = bool(failed.any())
        record["deblend_blendConvergenceFailedFlag"] = bool(parents.flags["no_convergence"][row])
        record["deblend_incompleteData"] = bool(parents.flags["incomplete_data"][row]) or missing_psf
        if family.blend:
            record["deblend_nChild"] = len(family.sources)
            record["deblend_nComponents"] = sum(components[i] for i in sources.id[family.sources].tolist())
    return catalog


def write_objects(
    schemas: CatalogSchemas,
    merged: SourceCatalog,
    families: Sequence[MergedParent],
    result: DeblendResult | None,
    posterior: Posterior | None,
    peaks: Sequence[PeakRecord | None],
    components: dict[int, int],
    peak_ids: NDArray[np.int64],
) -> SourceCatalog:
    """Make the catalogue of objects.

    Parameters
    ----------
    schemas, merged, families, result, components
        As for `write_parents`.
    posterior : `lsst.meas.vaedeblend.posterior.Posterior` or `None`
        Posterior of the sources.
    peaks : sequence of `lsst.afw.detection.PeakRecord` or `None`
        Peak of the merged detection that each source comes from; none for one that the deblender found.
    peak_ids : `numpy.ndarray`
        Identifiers of the sources' peaks.

    Returns
    -------
    catalog : `lsst.afw.table.SourceCatalog`
        Isolated and pseudo sources with their footprints, then the children, ordered by parent.
    """
    isolated = [family for family in families if family.isolated]
    blends = [family for family in families if family.blend]
    catalog = schemas.object_catalog(len(isolated) + sum(len(family.sources) for family in blends))
    source_of = np.full(len(catalog), -1)
    records = iter(range(len(catalog)))
    by_id = {record.getId(): record for record in merged}
    for family in isolated:
        row = next(records)
        record = catalog[row]
        record.setId(family.id)
        record.setFootprint(family.footprint)
        _copy(by_id[family.id], record, schemas.copied_names)
        if family.peaks:
            peak = family.peaks[0]
            _copy(peak, record, schemas.peak_names)
            record["deblend_peak_center_x"], record["deblend_peak_center_y"] = peak.getIx(), peak.getIy()
            record["deblend_peakId"] = peak.getId()
        if len(family.sources):
            source_of[row] = family.sources[0]
    for family in blends:
        assert result is not None
        sources = result.sources
        y0, x0 = sources.origin
        for i in family.sources.tolist():
            row = next(records)
            record, source_of[row] = catalog[row], i
            record.setId(int(sources.id[i]))
            record.setParent(family.id)
            _copy(by_id[family.id], record, schemas.copied_names)
            if peaks[i] is not None:
                _copy(peaks[i], record, schemas.peak_names)
            else:
                _detected(record, schemas.peak_names, sources, i)
            record["deblend_peak_center_x"] = int(np.rint(sources.peak_x[i])) + x0
            record["deblend_peak_center_y"] = int(np.rint(sources.peak_y[i])) + y0
            record["deblend_peakId"] = int(peak_ids[i])
            record["deblend_blendId"] = family.id
            record["deblend_blendNChild"] = record["deblend_parentNChild"] = len(family.sources)
            record["deblend_parentNPeaks"] = len(family.peaks)
            record["deblend_nComponents"] = components[int(sources.id[i])]
            record["deblend_chi2"] = sources.chi2[i]
            record["deblend_edgePixels"] = bool(sources.flags["edge"][i])
    _fill_posterior(catalog, schemas.bands, source_of, result, posterior)
    return catalog


def _copy(source: Any, record: Any, names: Sequence[str]) -> None:
    for name in names:
        record[name] = source[name]


def _detected(record: Any, names: Sequence[str], sources: Any, i: int) -> None:
    """Mark the bands in which a peak that the deblender found is significant, and the best one at least."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.nan_to_num(sources.flux[i] / sources.flux_err[i])
    for b, band in enumerate(sources.bands):
        if f"merge_peak_{band}" in names:
            record[f"merge_peak_{band}"] = bool(ratio[b] >= min(_DETECTED, ratio.max()))


def _fill_posterior(
    catalog: SourceCatalog,
    bands: Sequence[str],
    source_of: NDArray,
    result: DeblendResult | None,
    posterior: Posterior | None,
) -> None:
    """Fill the columns of the posterior; those of sources that the deblender did not see are NaN."""
    if not len(catalog):
        return
    known = source_of >= 0
    rows = source_of[known]

    def fill(name: str, values: NDArray | None) -> None:
        column = np.full(len(catalog), np.nan)
        if values is not None:
            column[known] = values[rows]
        catalog[name] = column

    for b, band in enumerate(bands):
        fill(posterior_column("flux", band), None if posterior is None else posterior.flux[:, b])
        fill(posterior_column("fluxErr", band), None if posterior is None else posterior.flux_err[:, b])
    for k, moment in enumerate(("xx", "yy", "xy")):
        fill(posterior_column("shape", moment), None if posterior is None else posterior.shape[:, k])
        fill(posterior_column("shapeErr", moment), None if posterior is None else posterior.shape_err[:, k])
    for name in SOURCE_FLAGS:
        column = np.zeros(len(catalog), bool)
        if result is not None:
            column[known] = result.sources.flags[name][rows]
        catalog[posterior_column("flag", name)] = column

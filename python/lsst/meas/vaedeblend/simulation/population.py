# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Galaxy populations: what galaxies there are, before any telescope has seen them.

Three sources give the same `Population`: `draw_population`, a model with
COSMOS-like number counts, sizes, redshifts and types that ships with the
package, `read_cosmos`, the parametric fits of a `galsim.COSMOSCatalog` on the
user's disk, and `read_real`, the images of a `galsim.RealGalaxyCatalog`.
"""

from __future__ import annotations

__all__ = [
    "KNOTS",
    "NONE",
    "REAL",
    "SERSIC",
    "STAR",
    "Population",
    "concatenate",
    "draw_population",
    "draw_stars",
    "read_cosmos",
    "read_real",
    "real_catalogue",
    "without_gradients",
]

import dataclasses
import functools
import os

import galsim
import numpy as np
from astropy.table import Table

from .surveys import AB_ZEROPOINT_NJY, SurveyInfo

NONE, SERSIC, KNOTS, STAR, REAL = 0, 1, 2, 3, 4
"""Kinds of a component; a star is a source with a single point-like component, a real galaxy one image."""

_MAX_COMPONENTS = 3
_SED_FILES = ("CWW_E_ext.sed", "CWW_Sbc_ext.sed", "CWW_Scd_ext.sed", "CWW_Im_ext.sed")
_REDSHIFT_GRID = np.linspace(0.0, 4.0, 161)


@dataclasses.dataclass
class Population:
    """Intrinsic properties of N galaxies with up to C components each.

    Attributes
    ----------
    bands : `tuple` [`str`]
        Bands of the fluxes.
    kind : `numpy.ndarray`, (N, C) int
        `NONE`, `SERSIC`, `KNOTS`, `STAR` or `REAL`.
    sersic : `numpy.ndarray`, (N, C)
        Sersic index.
    hlr : `numpy.ndarray`, (N, C)
        Half-light radius, arcsec, of the circle with the ellipse's area.
    g1, g2 : `numpy.ndarray`, (N, C)
        Reduced-shear ellipticity (a - b) / (a + b) of each component. Of a real galaxy, whose image has its
        own shape: cosine and sine of twice the angle by which the image is turned.
    flux : `numpy.ndarray`, (N, C, B)
        Flux in nJy.
    redshift : `numpy.ndarray`, (N,)
    source_id : `numpy.ndarray`, (N,) int
        Identifier of the galaxy in its source; keeps samples disjoint. Row i of a real catalogue has -1 - i.
    catalogue : `str`
        File of the `galsim.RealGalaxyCatalog` that real galaxies are images of; empty without any.
    shear : `numpy.ndarray`, (N, 2), optional
        Reduced shear of the images of real galaxies, after they are turned; none if not given.
    """

    bands: tuple[str, ...]
    kind: np.ndarray
    sersic: np.ndarray
    hlr: np.ndarray
    g1: np.ndarray
    g2: np.ndarray
    flux: np.ndarray
    redshift: np.ndarray
    source_id: np.ndarray
    catalogue: str = ""
    shear: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.shear is None:
            self.shear = np.zeros((len(self), 2))

    def __len__(self) -> int:
        return len(self.redshift)

    def __getitem__(self, rows) -> Population:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Population(**{k: v[rows] if isinstance(v, np.ndarray) else v for k, v in values.items()})

    def in_bands(self, bands: tuple[str, ...]) -> Population:
        """The same galaxies in some of the bands."""
        rows = [self.bands.index(b) for b in bands]
        return dataclasses.replace(self, bands=tuple(bands), flux=self.flux[..., rows])

    @property
    def total_flux(self) -> np.ndarray:
        """Flux of all components, nJy, shape (N, B)."""
        return self.flux.sum(axis=1)

    def magnitude(self, band: str) -> np.ndarray:
        """AB magnitudes in one band, shape (N,)."""
        return AB_ZEROPOINT_NJY - 2.5 * np.log10(self.total_flux[:, self.bands.index(band)])


@functools.cache
def _sed_fluxes(survey: SurveyInfo, reference_band: str) -> np.ndarray:
    """Relative f_nu of each CWW type, redshift and band; 1 in the reference band.

    Photon-counting AB fluxes, integral(f_lambda S lambda) / integral(S / lambda).
    Shape (4, number of redshifts, B).
    """
    table = np.empty((len(_SED_FILES), len(_REDSHIFT_GRID), len(survey.bands)))
    for i, name in enumerate(_SED_FILES):
        path = os.path.join(galsim.meta_data.share_dir, "SEDs", name)
        wave, f_lambda = np.loadtxt(path, unpack=True)[:2]
        wave = wave / 10.0  # the files are in Angstrom
        for j, z in enumerate(_REDSHIFT_GRID):
            for b, band in enumerate(survey.bands):
                lam, s = band.wavelength, band.response
                f = np.interp(lam / (1 + z), wave, f_lambda, left=0.0, right=f_lambda[-1])
                table[i, j, b] = np.trapezoid(f * s * lam, lam) / np.trapezoid(s / lam, lam)
    reference = survey.band_names.index(reference_band)
    # A template without light in the reference band at high redshift cannot be
    # normalised there; the floor keeps its colours finite and very red.
    table = np.maximum(table, 1e-4 * table.max(axis=2, keepdims=True))
    return table / table[:, :, reference : reference + 1]


def _component_colours(sed_type: np.ndarray, redshift: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Interpolate colours in type (0 E ... 3 Im) and redshift, in log flux; shape (n, B)."""
    t = np.clip(sed_type, 0, 3 - 1e-6)
    z = np.clip(redshift / _REDSHIFT_GRID[1], 0, len(_REDSHIFT_GRID) - 1 - 1e-6)
    i, j = t.astype(int), z.astype(int)
    u, v = (t - i)[:, None], (z - j)[:, None]
    log = np.log(table)
    return np.exp(
        (1 - u) * ((1 - v) * log[i, j] + v * log[i, j + 1])
        + u * ((1 - v) * log[i + 1, j] + v * log[i + 1, j + 1])
    )


def _reference_band(survey: SurveyInfo) -> str:
    return next((b for b in ("i", "VIS") if b in survey.band_names), survey.band_names[0])


def draw_population(
    n: int,
    survey: SurveyInfo,
    rng: np.random.Generator,
    *,
    mag_range: tuple[float, float] = (18.0, 27.3),
    count_slope: float = 0.3,
    colour_scatter: float = 0.05,
    knot_fraction: float = 0.4,
    size_scatter: float = 0.22,
    sersic_range: tuple[float, float] = (0.5, 5.5),
) -> Population:
    """Draw galaxies from the embedded COSMOS-like model.

    Parameters
    ----------
    n : `int`
        Number of galaxies.
    survey : `SurveyInfo`
        Its bands give the fluxes.
    rng : `numpy.random.Generator`
    mag_range : `tuple`
        Magnitude limits in i (or VIS).
    count_slope : `float`
        d log10 N / dm of the number counts. Deep i-band counts have about 0.3;
        a smaller value gives a training set more bright galaxies.
    colour_scatter : `float`
        Standard deviation, mag, of each band's flux about the template's.
    knot_fraction : `float`
        Fraction of the disks that carry star-forming knots.
    size_scatter : `float`
        Scatter of the half-light radii about their relation with magnitude, dex.
    sersic_range : `tuple`
        Limits of the index of single Sersic profiles.

    Returns
    -------
    population : `Population`

    Notes
    -----
    Forms and values, rounded from published deep-field relations: redshifts
    follow p(z) ~ z^2 exp(-z / z0) with z0 = 0.0417 i - 0.744 (LSST Science
    Book, 2009, eq. 3.8), at least 0.1; half-light radii are log-normal about
    0.35" at i = 24 with slope -0.11 dex per mag and 0.22 dex scatter by default
    (the trend of HST COSMOS, Leauthaud et al. 2007). Half of the galaxies are
    disks, 30 percent bulge and disk with colours of their own, 20 percent
    single Sersic profiles. Disks are oblate with intrinsic thickness 0.2,
    seen at random inclination.
    """
    lo, hi = mag_range
    # Inverse of the cumulative distribution of an exponential law in magnitude.
    p = rng.random(n)
    k = count_slope * np.log(10.0)
    mag = lo + np.log1p(p * np.expm1(k * (hi - lo))) / k if abs(k) > 1e-9 else lo + p * (hi - lo)
    redshift = np.clip(rng.gamma(3.0, np.maximum(0.0417 * mag - 0.744, 0.1)), 0.02, 3.99)
    size = np.clip(0.35 * 10 ** (-0.11 * (mag - 24) + size_scatter * rng.standard_normal(n)), 0.04, 5.0)

    family = rng.choice(3, size=n, p=(0.5, 0.3, 0.2))  # disk, bulge + disk, single Sersic
    is_disk, is_both, is_single = (family == i for i in range(3))
    has_disk = is_disk | is_both

    shape = (n, _MAX_COMPONENTS)
    kind = np.zeros(shape, int)
    sersic = np.ones(shape)
    hlr = np.full(shape, 0.1)
    q = np.ones(shape)
    sed_type = np.zeros(shape)
    share = np.zeros(shape)
    angle = np.repeat(rng.random(n)[:, None] * np.pi, _MAX_COMPONENTS, axis=1)

    # Component 0: the disk, or the single profile.
    kind[:, 0] = SERSIC
    hlr[:, 0] = size
    share[:, 0] = 1.0
    cos_i = rng.random(n)
    thickness = 0.2
    q[:, 0] = np.sqrt(cos_i**2 + thickness**2 * (1 - cos_i**2))
    single_q = np.clip(1 - np.abs(rng.normal(0.0, 0.35, n)), 0.2, 1.0)
    q[is_single, 0] = single_q[is_single]
    index = np.clip(2.0 * np.exp(0.6 * rng.standard_normal(n)), *sersic_range)
    sersic[:, 0] = np.where(is_single, index, 1.0)
    # Profiles cost GalSim a table per index: a grid of tenths is dense enough.
    sersic[:, 0] = np.round(sersic[:, 0], 1)
    early = np.clip((sersic[:, 0] - 1.0) / 3.0, 0, 1)
    sed_type[:, 0] = np.where(is_single, 2.6 * (1 - early), 1.0 + 2.0 * rng.random(n))
    sed_type[:, 0] += 0.3 * rng.standard_normal(n)

    # Component 1: the bulge; a share of the reference-band light.
    kind[is_both, 1] = SERSIC
    b_to_t = rng.beta(1.5, 2.5, n)
    share[is_both, 1] = b_to_t[is_both]
    share[is_both, 0] -= b_to_t[is_both]
    sersic[:, 1] = rng.choice([2.0, 3.0, 4.0], n)
    hlr[:, 1] = size * 10 ** rng.normal(-0.35, 0.2, n)
    q[:, 1] = rng.uniform(0.5, 1.0, n)
    angle[:, 1] += rng.normal(0, 0.2, n)
    sed_type[:, 1] = np.abs(rng.normal(0, 0.4, n))

    # Component 2: knots in the disk, bluer than it.
    knotty = has_disk & (rng.random(n) < knot_fraction)
    kind[knotty, 2] = KNOTS
    part = rng.uniform(0.03, 0.4, n) * share[:, 0]
    share[knotty, 2] = part[knotty]
    share[knotty, 0] -= part[knotty]
    hlr[:, 2] = hlr[:, 0] * rng.uniform(0.8, 1.3, n)
    q[:, 2] = q[:, 0]
    sed_type[:, 2] = np.minimum(sed_type[:, 0] + rng.uniform(0, 1.5, n), 3.0)

    scatter = 10 ** (-0.4 * colour_scatter * rng.standard_normal((n, 1, len(survey.bands))))
    return _assemble(survey, mag, redshift, kind, sersic, hlr, q, angle, share, sed_type, scatter)


def draw_stars(
    n: int,
    survey: SurveyInfo,
    rng: np.random.Generator,
    *,
    mag_range: tuple[float, float] = (17.0, 26.0),
) -> Population:
    """Draw stars: point sources with blackbody colours between 3000 and 9000 K.

    Parameters
    ----------
    n : `int`
        Number of stars.
    survey : `SurveyInfo`
        Its bands give the fluxes.
    rng : `numpy.random.Generator`
    mag_range : `tuple`
        Limits of the reference band's magnitudes, between which counts are flat, as
        they nearly are at high galactic latitude.

    Returns
    -------
    stars : `Population`
        One `STAR` component each, redshift 0.
    """
    # log-uniform with more cool stars than hot ones, as in a magnitude-limited sample
    temperature = 3000.0 * 3.0 ** (rng.random(n) ** 1.5)
    wavelength = np.array([np.average(b.wavelength, weights=b.response) for b in survey.bands])
    # Planck's law per unit frequency at each band's mean wavelength: nu^3 / (exp(h nu / k T) - 1);
    # h c / k = 1.4388e7 nm K.
    nu = 1.0 / wavelength
    f_nu = nu**3 / np.expm1(1.4388e7 * nu / temperature[:, None])
    f_nu /= f_nu[:, survey.band_names.index(_reference_band(survey)), None]
    f_nu *= 10 ** (-0.4 * 0.1 * rng.standard_normal(f_nu.shape))
    mag = rng.uniform(*mag_range, n)
    shape = (n, _MAX_COMPONENTS)
    kind = np.zeros(shape, int)
    kind[:, 0] = STAR
    flux = np.zeros((*shape, len(survey.bands)))
    flux[:, 0] = 10 ** (-0.4 * (mag - AB_ZEROPOINT_NJY))[:, None] * f_nu
    zeros = np.zeros(shape)
    return Population(
        survey.band_names, kind, zeros + 1, zeros, zeros, zeros, flux, np.zeros(n), np.arange(n)
    )


def concatenate(populations: list[Population]) -> Population:
    """Join populations of the same bands, in order; at most one catalogue of real galaxies among them."""
    if len({p.bands for p in populations}) != 1:
        raise ValueError(f"Populations have different bands: {[p.bands for p in populations]}.")
    catalogues = sorted({p.catalogue for p in populations} - {""})
    if len(catalogues) > 1:
        raise ValueError(f"Populations have images from different catalogues: {catalogues}.")
    names = [f.name for f in dataclasses.fields(Population) if f.name not in ("bands", "catalogue")]
    joined = {k: np.concatenate([getattr(p, k) for p in populations]) for k in names}
    return Population(bands=populations[0].bands, catalogue="".join(catalogues), **joined)


def without_gradients(population: Population) -> Population:
    """Give all components of a galaxy the colour of the whole; their shares are those of the mean band."""
    flux = population.flux
    total = flux.sum(axis=1, keepdims=True)
    share = (flux / total).mean(axis=2, keepdims=True)
    return dataclasses.replace(population, flux=share * total)


def read_cosmos(
    directory: str | os.PathLike,
    survey: SurveyInfo,
    *,
    file_name: str | None = None,
    exclusion_level: str = "marginal",
) -> Population:
    """Read the parametric fits of a `galsim.COSMOSCatalog`.

    Parameters
    ----------
    directory : path
        Where the catalogue and its ``_fits`` companion lie (GalSim's
        ``galsim_download_cosmos`` puts them there).
    survey : `SurveyInfo`
        Its bands give the fluxes.
    file_name : `str`, optional
        Catalogue file in the directory; GalSim's default sample otherwise.
    exclusion_level : `str`
        As in `galsim.COSMOSCatalog`.

    Returns
    -------
    population : `Population`

    Raises
    ------
    OSError
        If the catalogue is not there.

    Notes
    -----
    Two-component fits give a de Vaucouleurs bulge with an elliptical's
    spectrum and an exponential disk with a late spiral's; single Sersic fits
    take the template that suits their index, as GalSim's chromatic
    parametric galaxies do. The survey's i (or VIS) band stands in for F814W,
    in which the catalogue's magnitudes are given.
    """
    directory = os.fspath(directory)
    catalog = galsim.COSMOSCatalog(
        dir=directory, file_name=file_name, use_real=False, exclusion_level=exclusion_level
    )
    records = [catalog.getParametricRecord(i) for i in range(catalog.nobjects)]
    n = len(records)
    mag = np.array([r["mag_auto"] for r in records], float)
    redshift = np.array([r["zphot"] for r in records], float)
    two = np.array([bool(r["use_bulgefit"]) for r in records])
    sersicfit = np.array([r["sersicfit"] for r in records], float)
    bulgefit = np.array([r["bulgefit"] for r in records], float)
    radii = np.array([r["hlr"] for r in records], float)

    shape = (n, _MAX_COMPONENTS)
    kind, sersic = np.zeros(shape, int), np.ones(shape)
    hlr, q, angle = np.full(shape, 0.1), np.ones(shape), np.zeros(shape)
    sed_type, share = np.zeros(shape), np.zeros(shape)
    kind[:, 0] = SERSIC
    kind[two, 1] = SERSIC
    # Columns of the fits (GalSim's COSMOS documentation): index 2 is the Sersic
    # index, 3 the axis ratio, 7 the angle; in bulgefit the disk comes first and
    # the bulge's ratio and angle are 11 and 15.
    sersic[:, 0] = np.where(two, 1.0, np.clip(np.round(sersicfit[:, 2], 1), 0.3, 6.2))
    hlr[:, 0] = np.where(two, radii[:, 2], radii[:, 0])
    q[:, 0] = np.where(two, bulgefit[:, 3], sersicfit[:, 3])
    angle[:, 0] = np.where(two, bulgefit[:, 7], sersicfit[:, 7])
    sersic[:, 1], hlr[:, 1] = 4.0, np.where(two, radii[:, 1], 0.1)
    q[:, 1], angle[:, 1] = bulgefit[:, 11], bulgefit[:, 15]
    fluxes = np.array([r["flux"] for r in records], float)
    b_to_t = np.divide(fluxes[:, 1], fluxes[:, 1] + fluxes[:, 2], out=np.zeros(n), where=two)
    share[:, 0], share[:, 1] = np.where(two, 1 - b_to_t, 1.0), np.where(two, b_to_t, 0.0)
    single_type = np.select([sersicfit[:, 2] < 1.5, sersicfit[:, 2] < 3.0], [2.5, 1.0], 0.0)
    sed_type[:, 0] = np.where(two, 2.0, single_type)

    return _assemble(survey, mag, redshift, kind, sersic, hlr, q, angle, share, sed_type)


def read_real(path: str | os.PathLike, survey: SurveyInfo, rng: np.random.Generator) -> Population:
    """Read a `galsim.RealGalaxyCatalog`: galaxies that are images, deconvolved by GalSim when drawn.

    Parameters
    ----------
    path : path
        The catalogue's file; the files of images and PSFs that it names lie beside it.
    survey : `SurveyInfo`
        Its bands give the fluxes.
    rng : `numpy.random.Generator`
        Draws redshifts and spectral types where the catalogue has none.

    Returns
    -------
    population : `Population`
        One `REAL` component each, unturned.

    Raises
    ------
    OSError
        If the catalogue is not there, or is none.

    Notes
    -----
    An image has one band: it is scaled in each band to the flux that the galaxy's spectrum would give, from
    the catalogue's magnitude (in its own band, for which the survey's i or VIS stands in), the redshift in
    the companion file ``<stem>_fits.fits`` (column ``zphot``) and the template that suits its Sersic index
    there (column ``sersicfit``), as in `read_cosmos`. Without them redshifts follow `draw_population`'s
    distribution, and types are uniform.
    """
    path = os.path.abspath(path)
    catalog = real_catalogue(path)
    n = catalog.nobjects
    mag = np.asarray(catalog.mag, float)
    redshift = np.clip(rng.gamma(3.0, np.maximum(0.0417 * mag - 0.744, 0.1)), 0.02, 3.99)
    single_type = 3.0 * rng.random(n)
    stem, extension = os.path.splitext(path)
    if os.path.exists(companion := f"{stem}_fits{extension}"):
        table = Table.read(companion)
        columns = {c.lower(): c for c in table.colnames}
        where = {int(i): k for k, i in enumerate(table["IDENT"])}
        at = [where.get(int(i)) for i in catalog.ident]
        found = np.array([k is not None for k in at])
        rows = np.array([k for k in at if k is not None], int)
        if "zphot" in columns:
            z = np.asarray(table[columns["zphot"]], float)[rows]
            redshift[found] = np.where((z > 0) & (z < 4), z, redshift[found])
        if "sersicfit" in columns:
            index = np.asarray(table[columns["sersicfit"]], float)[rows, 2]
            single_type[found] = np.select([index < 1.5, index < 3.0], [2.5, 1.0], 0.0)
    shape = (n, _MAX_COMPONENTS)
    kind, share, sed_type = np.zeros(shape, int), np.zeros(shape), np.zeros(shape)
    kind[:, 0], share[:, 0], sed_type[:, 0] = REAL, 1.0, single_type
    ones, zeros = np.ones(shape), np.zeros(shape)
    population = _assemble(survey, mag, redshift, kind, ones, ones, ones, zeros, share, sed_type)
    population.g1[:, 0] = 1.0
    population.source_id = -1 - np.arange(n)
    population.catalogue = path
    return population


@functools.cache
def real_catalogue(path: str) -> galsim.RealGalaxyCatalog:
    """Open a catalogue of real galaxies once per process; it keeps its image files open."""
    return galsim.RealGalaxyCatalog(os.path.basename(path), dir=os.path.dirname(path))


def _assemble(survey, mag, redshift, kind, sersic, hlr, q, angle, share, sed_type, scatter=1.0) -> Population:
    """Turn shares of the reference band's light into fluxes, and axis ratios into ellipticities."""
    n = len(mag)
    table = _sed_fluxes(survey, _reference_band(survey))
    colours = _component_colours(sed_type.ravel(), np.repeat(redshift, _MAX_COMPONENTS), table)
    flux = 10 ** (-0.4 * (mag - AB_ZEROPOINT_NJY))[:, None, None] * share[:, :, None] * scatter
    flux = flux * colours.reshape(n, _MAX_COMPONENTS, -1)
    q = np.clip(q, 0.05, 1.0)
    g = (1 - q) / (1 + q)
    return Population(
        bands=survey.band_names,
        kind=kind,
        sersic=sersic,
        hlr=np.maximum(hlr, 1e-3),
        g1=g * np.cos(2 * angle),
        g2=g * np.sin(2 * angle),
        flux=flux,
        redshift=redshift,
        source_id=np.arange(n),
    )

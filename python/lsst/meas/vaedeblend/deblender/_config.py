# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Configuration of the iterative procedure."""

from __future__ import annotations

from lsst.pex.config import Config, Field, RangeField

__all__ = ["DeblendConfig"]


class DeblendConfig(Config):
    """Configuration of the iterative procedure."""

    minPasses = RangeField(
        dtype=int,
        doc="Passes through the network at the start and, without refinement, for a trial of new peaks. From "
        "the second on, cutouts have their neighbours subtracted; at the start only those are passed "
        "again that had much else in view.",
        default=3,
        min=1,
    )
    maxIterations = RangeField(
        dtype=int,
        doc="Rounds of refinement and peak search after the first passes. What still changes then "
        "is flagged no_convergence.",
        default=6,
        min=0,
    )
    fluxTolerance = RangeField(
        dtype=float,
        doc="Fluxes have settled when none changes by more than this times its standard deviation, or by "
        "more than this times a tenth of itself.",
        default=0.1,
        min=0.0,
        inclusiveMin=False,
    )
    refinementSteps = RangeField(
        dtype=int,
        doc="Gauss-Newton steps in which the latents are refined on the pixels after the first passes, after "
        "new peaks were accepted, and in the end; 0 keeps the network's own answers. Networks without "
        "the graphs for it are not refined.",
        default=4,
        min=0,
    )
    refinementTolerance = RangeField(
        dtype=float,
        doc="A source has settled when a step promises to lower chi-square by less than this.",
        default=1.0,
        min=0.0,
    )
    refinementPrior = RangeField(
        dtype=float,
        doc="Precision of the latents' normal prior in the refinement. Below 1 shapes of faint sources are "
        "less round, and all that is measured of them is noisier.",
        default=0.5,
        min=0.0,
        inclusiveMin=False,
    )
    refinementWall = RangeField(
        dtype=float,
        doc="Distance of latents from the origin, in units of the root of their number, beyond which a steep "
        "prior holds them: farther out the decoder draws what it has never seen.",
        default=1.5,
        min=0.0,
        inclusiveMin=False,
    )
    refinementModelError = RangeField(
        dtype=float,
        doc="Relative error of the models that the refinement adds in quadrature to the noise: what the "
        "decoder cannot draw of a bright galaxy is not to be made up for by its faint neighbours.",
        default=0.03,
        min=0.0,
    )
    posteriorScale = RangeField(
        dtype=float,
        doc="Factor on the widths of the refined posterior. The linear approximation knows neither the "
        "errors of the decoder nor tails of the population; the default is what held-out fields ask for.",
        default=1.25,
        min=0.0,
        inclusiveMin=False,
    )
    fluxSystematic = RangeField(
        dtype=float,
        doc="Relative error of the fluxes of refined sources that is added in quadrature: what the "
        "decoder cannot draw.",
        default=0.015,
        min=0.0,
    )
    neighbourError = RangeField(
        dtype=float,
        doc="Relative error of the neighbours' models: so much of their light under a source is added to the "
        "error of its flux, in quadrature.",
        default=0.03,
        min=0.0,
    )
    refinementBatch = RangeField(
        dtype=int,
        doc="Sources that are refined jointly; bounds the memory, about half a megabyte each.",
        default=512,
        min=1,
    )
    measureNoiseCorrelation = Field[bool](
        doc="Measure in each band how the noise of neighbouring pixels correlates, from pixels without "
        "sources, and count it in significances and errors? Otherwise noise is white.",
        default=True,
    )
    subtractSky = Field[bool](
        doc="Measure the sky left over around each pixel, from pixels without sources, and subtract it?",
        default=True,
    )
    skyPrior = RangeField(
        dtype=float,
        doc="How large a sky to expect, in standard deviations of a pixel's noise.",
        default=0.1,
        min=0.0,
        inclusiveMin=False,
    )
    findNewPeaks = Field[bool](
        doc="Look for further peaks in the residuals, where peaks are given as well? Detection misses many "
        "neighbours, whose light others would take. A source that is found so has to earn its place against "
        "noise and errors of the models.",
        default=True,
    )
    peakThreshold = RangeField(
        dtype=float,
        doc="Significance of the peaks to start from in parents that come without any.",
        default=5.0,
        min=0.0,
    )
    newPeakThreshold = RangeField(
        dtype=float, doc="Significance that a peak in the residual needs to be tried.", default=6.0, min=0.0
    )
    minSeparation = RangeField(
        dtype=float,
        doc="Distance that found peaks keep from each other and from existing sources, pixel.",
        default=3.0,
        min=0.0,
    )
    modelError = RangeField(
        dtype=float,
        doc="Relative error of the models. In the search and the trial of new peaks it is added in "
        "quadrature to the noise, so that what is left of a bright galaxy does not pass for sources.",
        default=0.2,
        min=0.0,
    )
    coherentModelError = RangeField(
        dtype=float,
        doc="Relative error of the models that neighbouring pixels and bands share, as what the decoder "
        "cannot draw of a galaxy does. In the search for new peaks it is added in quadrature to the noise of "
        "the matched filter: a new peak has to stand out from the models' light under it.",
        default=0.01,
        min=0.0,
    )
    maxNewPeaks = RangeField(dtype=int, doc="Peaks tried at once in one parent.", default=8, min=1)
    maxPeaks = RangeField(
        dtype=int,
        doc="Sources in one parent. Of more given peaks only the brightest are deblended; the others keep "
        "a row without a model.",
        default=1000,
        min=1,
    )
    costPerParameter = RangeField(
        dtype=float,
        doc="Decrease of chi-square that a source must bring for each of its parameters: a flux per band, "
        "two coordinates, size and two ellipticities.",
        default=4.0,
        min=0.0,
    )
    dropGivenPeaks = Field[bool](
        doc="Drop given peaks too when they bring less? Otherwise they are kept and flagged insignificant.",
        default=False,
    )
    fluxPrior = RangeField(
        dtype=float,
        doc="Weight of the network's own flux in the joint solution, relative to that of the data. A small "
        "one keeps sources that almost coincide from trading flux.",
        default=1e-4,
        min=1e-9,
    )
    edgeDistance = RangeField(
        dtype=int,
        doc="A peak closer than this to the border or to a pixel marked as edge is flagged, pixel.",
        default=5,
        min=0,
    )
    batchSize = RangeField(
        dtype=int,
        doc="Cutouts that go through the network at once; bounds the memory it takes.",
        default=32,
        min=1,
    )
    allowMissingBands = Field[bool](
        doc="Deblend scenes that lack some of the network's bands? Objects are flagged missing_band, and "
        "have no flux there. Patches that lack a band are common where surveys begin and end, and scarlet "
        "deblends them. Otherwise there is no work to do for such patches.",
        default=True,
    )
    allowOtherPixelScale = Field[bool](
        doc="Deblend scenes with another pixel scale than the network's? Sizes come out wrong by the ratio.",
        default=False,
    )

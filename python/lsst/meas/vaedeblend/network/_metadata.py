# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an artefact says of itself."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

__all__ = ["CONTRACT_VERSION", "KINDS", "NetworkError", "NetworkMetadata"]

CONTRACT_VERSION = 1
"""Version of the contract between artefact and runtime."""

KINDS = ("deblender", "decoder", "render", "linearise")
"""Kinds of artefacts; those after the first accompany it, under its name with the kind behind it."""

_OPTIONAL = ("decoder", "decoder_sha256")
"""Keys that documents may leave out."""


class NetworkError(Exception):
    """A network artefact cannot be used; the message says what was expected and what was found."""


@dataclasses.dataclass(frozen=True)
class NetworkMetadata:
    """What the runtime and the reader of a card must know about a network.

    Parameters
    ----------
    name : `str`
        Name of the network; a decoder bears the name of its deblender.
    kind : `str`
        One of `KINDS`.
    bands : `tuple` [`str`]
        Bands in the order of the arrays.
    pixel_scale : `float`
        Width of a pixel, arcsec.
    cutout_size, latent_size : `int`
        Sizes S (pixel) and L.
    frame : `dict`
        Frame of the model: ``{"type": "gaussian", "sigma": 0.8}`` with sigma in pixels, or ``{"type":
        "observed", "fwhm": {band: arcsec}}`` with, optionally, ``"profile"`` "kolmogorov" (the default) or
        "gaussian", and with ``"pixel_scale": {band: arcsec}`` where bands may have pixels of their own.
    centre : `tuple` [`float`]
        (y, x) pixel index of the cutout within half a pixel of which the target lies; half-integers mean a
        corner of pixels.
    training_range : `dict`
        ``{"noise": {band: [low, high]}, "psf_fwhm": [low, high]}``: background standard deviation per pixel
        in nJy and FWHM in arcsec that the network has seen. Either may be missing if the network has no
        range.
    training : `dict`
        Configuration, its hash, git commit, number of samples, description of the training set, command.
    figures_of_merit : `dict`
        Measured figures, with the command that measured them.
    licence : `str`
        Licence of the weights.
    weights_sha256 : `str`
        Checksum of the graph, see `graph_sha256`.
    contract : `int`
        Version of the contract.
    decoder : `str`, optional
        Name of the network whose decoder draws for this one too, if not its own: networks of one prior store
        it once.
    decoder_sha256 : `str`, optional
        Checksum of the decoder's graph, for a deblender that leaves the drawing to it.

    Raises
    ------
    NetworkError
        Raised if a value is missing, of the wrong type, or out of its range.
    """

    name: str
    kind: str
    bands: tuple[str, ...]
    pixel_scale: float
    cutout_size: int
    latent_size: int
    frame: dict[str, Any]
    centre: tuple[float, float]
    training_range: dict[str, Any]
    training: dict[str, Any]
    figures_of_merit: dict[str, Any]
    licence: str
    weights_sha256: str = ""
    contract: int = CONTRACT_VERSION
    decoder: str = ""
    decoder_sha256: str = ""

    def __post_init__(self) -> None:
        def number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        def check(key: str, good: bool, expected: str) -> None:
            if not good:
                raise NetworkError(
                    f"network {self.name!r}: {key} should be {expected}, found {getattr(self, key)!r}."
                )

        def interval(value: Any) -> bool:
            return isinstance(value, list | tuple) and len(value) == 2 and all(map(number, value))

        check("contract", self.contract == CONTRACT_VERSION, f"{CONTRACT_VERSION} (this runtime's contract)")
        check("name", isinstance(self.name, str) and bool(self.name), "a name")
        check("kind", self.kind in KINDS, f"one of {list(KINDS)}")
        check(
            "bands",
            isinstance(self.bands, list | tuple)
            and len(self.bands) > 0
            and all(isinstance(b, str) and b for b in self.bands)
            and len(set(self.bands)) == len(self.bands),
            "a list of different band names",
        )
        object.__setattr__(self, "bands", tuple(self.bands))
        check("pixel_scale", number(self.pixel_scale) and self.pixel_scale > 0, "a positive number of arcsec")
        for key in ("cutout_size", "latent_size"):
            value = getattr(self, key)
            check(key, isinstance(value, int) and not isinstance(value, bool) and value > 0, "a positive int")
        check(
            "centre",
            interval(self.centre) and all(0 <= c <= self.cutout_size - 1 for c in self.centre),
            f"[y, x] inside the cutout of {self.cutout_size} pixels",
        )
        object.__setattr__(self, "centre", tuple(float(c) for c in self.centre))
        for key in ("frame", "training_range", "training", "figures_of_merit"):
            check(key, isinstance(getattr(self, key), dict), "an object")
        gaussian = (
            self.frame.get("type") == "gaussian"
            and number(self.frame.get("sigma"))
            and self.frame["sigma"] > 0
        )
        fwhm = self.frame.get("fwhm")
        observed = (
            self.frame.get("type") == "observed"
            and isinstance(fwhm, dict)
            and all(number(fwhm.get(b)) and fwhm[b] > 0 for b in self.bands)
            and self.frame.get("profile", "kolmogorov") in ("kolmogorov", "gaussian")
        )
        check(
            "frame",
            gaussian or observed,
            '{"type": "gaussian", "sigma": pixels} or {"type": "observed", "fwhm": {band: arcsec}} '
            f"with a FWHM for each of {list(self.bands)}",
        )
        noise, psf = self.training_range.get("noise"), self.training_range.get("psf_fwhm")
        check(
            "training_range",
            (noise is None or (isinstance(noise, dict) and all(interval(noise.get(b)) for b in self.bands)))
            and (psf is None or interval(psf)),
            '{"noise": {band: [low, high]}, "psf_fwhm": [low, high]}',
        )
        check("licence", isinstance(self.licence, str), "a string")
        check("weights_sha256", isinstance(self.weights_sha256, str), "a string")
        # It becomes part of a file's name, in the folder of this one.
        plain = isinstance(self.decoder, str) and re.fullmatch(r"[\w-][\w.-]*|", self.decoder) is not None
        check("decoder", plain, "the plain name of a network")
        check("decoder_sha256", isinstance(self.decoder_sha256, str), "a string")

    def check_deblender(self) -> None:
        """Check that the network was trained on blends.

        The prior, the first step of a training, is written in the same form, for comparisons: it has seen
        isolated galaxies alone, and takes a neighbour for a part of its target.

        Raises
        ------
        NetworkError
            Raised if it is a prior.
        """
        samples = self.training.get("samples")
        if isinstance(samples, dict) and "prior" in samples and "deblender" not in samples:
            name = self.name.removesuffix("_prior")
            raise NetworkError(
                f"Network {self.name} is a prior, trained on isolated galaxies alone: it cannot deblend. "
                f"The deblender that belongs to it is {name}."
            )

    def to_json(self) -> str:
        """Serialize to the JSON document that an artefact carries.

        Returns
        -------
        text : `str`
            The document, keys sorted.
        """
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "metadata") -> NetworkMetadata:
        """Parse and check a JSON document.

        Parameters
        ----------
        text : `str`
            The document.
        source : `str`, optional
            Where it comes from, for messages.

        Returns
        -------
        metadata : `NetworkMetadata`
            The metadata. Unknown keys are ignored, so that later writers may add some.

        Raises
        ------
        NetworkError
            Raised if the document is not valid.
        """
        try:
            document = json.loads(text)
        except ValueError as err:
            raise NetworkError(f"{source}: the metadata are not JSON: {err}.") from err
        if not isinstance(document, dict):
            raise NetworkError(
                f"{source}: the metadata should be an object, found {type(document).__name__}."
            )
        # A newer contract may have other keys: say so before complaining about any of them.
        if document.get("contract") != CONTRACT_VERSION:
            raise NetworkError(
                f"{source}: contract version {document.get('contract')!r}, "
                f"this runtime reads version {CONTRACT_VERSION}."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [key for key in names if key not in document and key not in _OPTIONAL]
        if missing:
            raise NetworkError(f"{source}: the metadata lack {missing}; they have {sorted(document)}.")
        try:
            return cls(**{key: document[key] for key in names if key in document})
        except NetworkError as err:
            raise NetworkError(f"{source}: {err}") from err

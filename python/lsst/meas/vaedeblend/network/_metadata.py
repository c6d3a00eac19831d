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

MAX_DOCUMENT, MAX_BANDS, MAX_CUTOUT, MAX_LATENT, MAX_NAME = 1 << 24, 64, 1024, 4096, 200
"""Bytes of a document, bands, pixels along a cutout, latents, and letters of a name: arrays are made by these
numbers before a graph could contradict them."""


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
            # Integers of any length are JSON, and those beyond a float's range are no measure of anything.
            return (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and -1e300 < value < 1e300
                and math.isfinite(value)
            )

        def plain(value: Any) -> bool:
            # Names become those of columns and files, and are printed.
            return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()

        def shown(value: Any) -> str:
            text = repr(value)
            return text if len(text) < 500 else f"{text[:500]}..."

        def check(key: str, good: bool, expected: str) -> None:
            if not good:
                raise NetworkError(
                    f"network {shown(self.name)}: {key} should be {expected}, "
                    f"found {shown(getattr(self, key))}."
                )

        def interval(value: Any) -> bool:
            return isinstance(value, list | tuple) and len(value) == 2 and all(map(number, value))

        # Of True and 1.0, too, Python says that they are 1.
        version = type(self.contract) is int and self.contract == CONTRACT_VERSION
        check("contract", version, f"{CONTRACT_VERSION} (this runtime's contract)")
        check("name", plain(self.name), "a name")
        check("kind", self.kind in KINDS, f"one of {list(KINDS)}")
        check(
            "bands",
            isinstance(self.bands, list | tuple)
            and 0 < len(self.bands) <= MAX_BANDS
            and all(plain(b) for b in self.bands)
            and len(set(self.bands)) == len(self.bands),
            f"a list of different band names, at most {MAX_BANDS}",
        )
        object.__setattr__(self, "bands", tuple(self.bands))
        check("pixel_scale", number(self.pixel_scale) and self.pixel_scale > 0, "a positive number of arcsec")
        for key, most in (("cutout_size", MAX_CUTOUT), ("latent_size", MAX_LATENT)):
            value = getattr(self, key)
            sound = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
            check(key, sound, f"a positive int, at most {most}")
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
        fwhm, scales = self.frame.get("fwhm"), self.frame.get("pixel_scale", {})
        own = isinstance(scales, dict) and all(number(s) and s > 0 for s in scales.values())
        observed = (
            self.frame.get("type") == "observed"
            and isinstance(fwhm, dict)
            and all(number(fwhm.get(b)) and fwhm[b] > 0 for b in self.bands)
            and self.frame.get("profile", "kolmogorov") in ("kolmogorov", "gaussian")
        )
        check(
            "frame",
            (gaussian or observed) and own,
            '{"type": "gaussian", "sigma": pixels} or {"type": "observed", "fwhm": {band: arcsec}} '
            f"with a FWHM for each of {list(self.bands)}, and pixel scales that are positive",
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
        file = isinstance(self.decoder, str) and re.fullmatch(r"[\w-][\w.-]*|", self.decoder) is not None
        check("decoder", file and len(self.decoder) <= MAX_NAME, "the plain name of a network")
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
        if len(text) > MAX_DOCUMENT:
            raise NetworkError(f"{source}: metadata of {len(text)} characters, {MAX_DOCUMENT} may be.")

        def constant(name: str) -> None:
            raise ValueError(f"{name} is no number")

        def finite(digits: str) -> float:
            value = float(digits)
            if not math.isfinite(value):
                raise ValueError(f"{digits:.50} is beyond the range of numbers")
            return value

        try:
            document = json.loads(text, parse_constant=constant, parse_float=finite)
        # Brackets within brackets exhaust the parser's stack.
        except (ValueError, RecursionError) as err:
            raise NetworkError(f"{source}: the metadata are not JSON: {err}.") from err
        if not isinstance(document, dict):
            raise NetworkError(
                f"{source}: the metadata should be an object, found {type(document).__name__}."
            )
        # A newer contract may have other keys: say so before complaining about any of them.
        if document.get("contract") != CONTRACT_VERSION:
            raise NetworkError(
                f"{source}: contract version {document.get('contract')!r:.100}, "
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

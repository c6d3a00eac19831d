# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Parts of fields with truth, as two deblenders or versions of one draw their sources.

usage: python benchmarks/before_after.py FIELDS BEFORE AFTER OUT.jpg PLACE [PLACE ...]

FIELDS, BEFORE and AFTER are directories: the fields, and what `vaedeblend evaluate fields` (or anything else
that ``score.py`` reads) has made of them. PLACE is NUMBER:X:Y, a field and the middle of a square of 96
pixels. Each has a row: coadds, and of both the sum of all models on the true sources' stamps, and what the
coadds have beyond it. Objects that match no true source are not in it: their light is left in the residual.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from lsst.meas.vaedeblend.evaluation.fields import FieldFile
from lsst.meas.vaedeblend.evaluation.figures import (
    colour,
    colour_key,
    new_figure,
    residual_map,
    scale_bar,
    show_colour,
    show_sigma,
)
from lsst.meas.vaedeblend.ground.cutouts import add_cutouts

HALF = 48
PIXEL_SCALE = 0.2


def total(field: FieldFile, path: Path) -> np.ndarray:
    """Sum of the models of a field, (B, H, W)."""
    with np.load(path, allow_pickle=False) as data:
        models = np.nan_to_num(data["model"]).astype(np.float32)
    out = np.zeros(field.image.shape, np.float32)
    add_cutouts(out, models, field.stamp_y0, field.stamp_x0)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("fields", "before", "after", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("places", nargs="+", metavar="NUMBER:X:Y")
    arguments = parser.parse_args()
    figure = new_figure(12.5, 2.65 * len(arguments.places))
    axes = figure.subplots(len(arguments.places), 5, squeeze=False)
    for row, place in zip(axes, arguments.places, strict=True):
        number, x, y = (int(part) for part in place.split(":"))
        name = f"field_{number:02d}.npz"
        field = FieldFile.read(arguments.fields / name)
        valid = np.isfinite(field.image) & (field.variance > 0)
        low_y, low_x = max(y - HALF, 0), max(x - HALF, 0)
        window = (slice(None), slice(low_y, low_y + 2 * HALF), slice(low_x, low_x + 2 * HALF))
        origin = (low_y, low_x)
        image = np.where(valid, field.image, 0.0)
        noise = np.sqrt(np.median(field.variance, axis=(1, 2)))
        grey = ~valid[window].all(axis=0)

        def paint(axis, pixels, title, bands=field.bands, noise=noise, grey=grey, origin=origin):
            rgb = colour(pixels, bands, noise)
            rgb[grey] = 90
            show_colour(axis, rgb, title, origin)

        paint(row[0], image[window], f"field {number}, {colour_key(field.bands)}")
        scale_bar(row[0], 5.0, PIXEL_SCALE)
        for title, folder, (models, left) in (
            ("before", arguments.before, row[1:3]),
            ("after", arguments.after, row[3:5]),
        ):
            drawn = total(field, folder / name)
            paint(models, drawn[window], f"models {title}")
            sigma = residual_map((image - drawn)[window], field.variance[window], valid[window])
            shown = show_sigma(left, sigma, f"coadds minus models {title}", origin)
            left.set_facecolor("0.85")
        figure.colorbar(shown, ax=row[-1], shrink=0.8, label="standard deviations")
        for axis, centres in ((row[0], "white"), (row[2], "black"), (row[4], "black")):
            near = (np.abs(field.x - low_x - HALF) < HALF) & (np.abs(field.y - low_y - HALF) < HALF)
            axis.plot(field.x[near], field.y[near], "+", color=centres, markersize=5, markeredgewidth=0.7)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.title.set_fontsize(8)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=75, pil_kwargs={"quality": 80})


if __name__ == "__main__":
    main()

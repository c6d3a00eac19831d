# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What deblending an area costs, from what was measured on one machine.

    vaedeblend demo DEMO
    python benchmarks/survey_cost.py DEMO --area 18000

Times are those of the results of `python benchmarks/bench.py demo`, bytes those of the demonstration,
scarlet's those of a directory of field files with its times and of one with its `.scarlet` files.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

RESULTS = Path(__file__).parent / "results" / "demo.json"
TABLES = ("object_vae_deblend", "object_vae_parent", "object_vae_models")


def table_bytes(demo: Path) -> dict[str, int]:
    """Bytes of each table of a demonstration; of several runs the last."""
    out = {}
    for name in TABLES:
        files = sorted((demo / "repo" / "vaedeblend" / "demo").rglob(f"{name}_*.parq"))
        out[name] = files[-1].stat().st_size
    return out


@click.command()
@click.argument("demo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--area", type=float, multiple=True, default=(1.0, 1000.0, 18000.0), help="Square degrees.")
@click.option("--objects", default=10_000, show_default=True, help="Objects of a patch.")
@click.option("--inner", default=3000, show_default=True, help="Width of a patch without overlap, pixel.")
@click.option("--scale", default=0.2, show_default=True, help="Width of a pixel, arcsec.")
@click.option("--scarlet-fields", type=click.Path(path_type=Path), help="Field files with scarlet's times.")
@click.option("--scarlet-files", type=click.Path(path_type=Path), help="Scarlet's own files.")
def main(
    demo: Path,
    area: tuple[float, ...],
    objects: int,
    inner: int,
    scale: float,
    scarlet_fields: Path | None,
    scarlet_files: Path | None,
) -> None:
    """Print patches, core hours and bytes for areas of the sky."""
    result = json.loads(RESULTS.read_text())["results"]["checkouts"][0]
    ms = result["ms_per_object"]["median"]
    n = json.loads((demo / "demo.json").read_text())["n_objects"]
    sizes = table_bytes(demo)
    per_object = sum(sizes.values()) / n
    click.echo(f"{ms:.1f} ms of one core per object ({RESULTS.name}, commit {result['commit']})")
    click.echo(f"{per_object:.0f} bytes per object, {sizes['object_vae_models'] / n:.0f} of them its model")
    if scarlet_fields:
        seconds = count = 0.0
        for path in sorted(scarlet_fields.glob("field_*.npz")):
            with np.load(path) as data:
                seconds += float(data["seconds"])
                count += len(data["model"])
        click.echo(f"scarlet: {1e3 * seconds / count:.0f} ms per object of {count:.0f}, on its own machine")
    if scarlet_files:
        from lsst.meas.vaedeblend.adapters.scarlet_file import read

        size = count = 0
        for path in sorted(scarlet_files.glob("*.scarlet")):
            size += path.stat().st_size
            models = read(path)
            count += len(models.sources()) + len(models.isolated)
        click.echo(f"scarlet: {size / count:.0f} bytes per object of {count}")
    click.echo(f"\n{'area':>8} {'patches':>9} {'objects':>9} {'core hours':>11} {'TB':>7}")
    for degrees in area:
        patches = int(np.ceil(degrees / (inner * scale / 3600) ** 2))
        total = patches * objects
        hours, terabytes = total * ms / 3.6e6, total * per_object / 1e12
        click.echo(f"{degrees:8.0f} {patches:9d} {total:9.2e} {hours:11.0f} {terabytes:7.2f}")


if __name__ == "__main__":
    main()

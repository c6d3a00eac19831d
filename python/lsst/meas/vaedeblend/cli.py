# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command ``vaedeblend``. Each subcommand imports what it needs and no more."""

from __future__ import annotations

__all__ = ["main"]

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_OUTPUT = click.Path(file_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)


class _Commands(click.Group):
    """Commands whose errors, from imports on, go through `_failures`."""

    def invoke(self, ctx: click.Context) -> Any:
        with _failures():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="meas_vaedeblend")
@click.option("-v", "--verbose", is_flag=True, help="Log more, and show where errors come from.")
def main(verbose: bool) -> None:
    """Deblend galaxies on multi-band coadds with variational autoencoders."""
    logging.basicConfig(format="%(name)s %(levelname)s: %(message)s")
    logging.getLogger("lsst.meas.vaedeblend").setLevel(logging.DEBUG if verbose else logging.INFO)


@main.command()
def info() -> None:
    """List the networks that are installed, and the execution providers there are."""
    import onnxruntime

    from .network import NetworkError, read_metadata, shipped_networks

    click.echo(f"onnxruntime {onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}")
    names = shipped_networks()
    if not names:
        click.echo("No network ships with this installation.")
    for name in names:
        try:
            m = read_metadata(name)
        except NetworkError as error:
            click.echo(f"\n{name}\n  unusable     {error}")
            continue
        rows = {
            "bands": "".join(m.bands) if all(len(b) == 1 for b in m.bands) else " ".join(m.bands),
            "pixel scale": f"{m.pixel_scale} arcsec",
            "cutout": f"{m.cutout_size} pixels, target at {list(m.centre)}",
            "latents": str(m.latent_size),
            "model frame": json.dumps(m.frame),
            "trained on": json.dumps(m.training_range),
            "training": str(m.training.get("description", "")),
            "figures": json.dumps(m.figures_of_merit),
            "weights": m.weights_sha256,
            "licence": m.licence,
        }
        click.echo(f"\n{name}")
        for key, value in rows.items():
            click.echo(f"  {key:<12} {value}")


@main.command()
@click.argument("name", default="")
def path(name: str) -> None:
    """Print where a file or folder that ships is: a pipeline, a configuration, an example for BPS.

    NAME is as in the repository, pipelines/deblend.yaml or config/training. Without one it is the folder that
    has all of them, for MEAS_VAEDEBLEND_DIR.
    """
    from .ground.files import shipped_file

    click.echo(shipped_file(name))


@main.command()
@click.argument("repo")
@click.argument("network")
@click.argument("collection")
def pin(repo: str, network: str, collection: str) -> None:
    """Store NETWORK, a name or path, in the Butler repository REPO as the dataset of COLLECTION.

    A pipeline run takes it from its input collections with vaeDeblend:useStoredNetwork=True.
    """
    from .adapters.stored_network import put_network

    put_network(repo, network, collection)


@main.command()
@click.argument("out", type=_OUTPUT)
@click.option("--network", default="lsst_ugrizy", show_default=True, help="Name or path of the network.")
@click.option("--survey", help="Survey to simulate; by default the one that the network was trained for.")
@click.option("--seed", default=1, show_default=True, help="Seed of the simulation.")
@click.option("--galaxies", type=_COUNT, default=150, show_default=True, help="Number of galaxies.")
@click.option(
    "--cells",
    type=(_COUNT, _COUNT),
    default=(4, 4),
    show_default=True,
    help="Number of cells along y and x.",
)
@click.option("--overwrite", is_flag=True, help="Replace the repository of an earlier demonstration.")
def demo(
    out: Path,
    network: str,
    survey: str | None,
    seed: int,
    galaxies: int,
    cells: tuple[int, int],
    overwrite: bool,
) -> None:
    """Simulate a patch, run `pipetask run` on it, compare with the truth, and draw a figure in OUT."""
    from .demo import format_table, run_demo

    summary = run_demo(
        out,
        network=network,
        survey=survey,
        seed=seed,
        n_galaxies=galaxies,
        cells=cells,
        overwrite=overwrite,
    )
    click.echo(format_table(summary))
    click.echo(f"Figure: {out / 'demo.png'}")


_CONFIG = click.Path(exists=True, dir_okay=False, path_type=Path)
_BY_BAND = "[BAND=]FILE"


@main.command()
@click.argument("out", type=_OUTPUT)
@click.option("--image", multiple=True, required=True, metavar=_BY_BAND, help="Image, background subtracted.")
@click.option("--variance", multiple=True, metavar=_BY_BAND, help="Variance, in units of the image squared.")
@click.option("--weight", multiple=True, metavar=_BY_BAND, help="Weight map, i.e. inverse variance, instead.")
@click.option("--psf", multiple=True, metavar=_BY_BAND, help="PSF image with odd sides.")
@click.option("--mask", multiple=True, metavar=_BY_BAND, help="Mask; pixels that are not 0 are not used.")
@click.option("--bad-bits", help="Bits of the masks that mean a bad pixel, as 0x21 or 33; all by default.")
@click.option("--bands", help="Bands of a cube in order, as ugrizy or u,g,r.")
@click.option("--zeropoint", multiple=True, metavar="[BAND=]MAG", help="AB magnitude of one unit.")
@click.option("--pixel-scale", type=float, help="Width of a pixel, arcsec, where there is no WCS.")
@click.option("--wcs", type=_CONFIG, help="FITS or text header with the WCS, instead of the images' own.")
@click.option("--peaks", type=_CONFIG, help="Table of peaks: x, y in pixels from 0, or ra, dec in degree.")
@click.option("--network", default="lsst_ugrizy", show_default=True, help="Name or path of the network.")
@click.option("-c", "--config", multiple=True, help="Setting of the procedure, as in -c refinementSteps=0.")
@click.option("--threads", default=1, show_default=True, help="Threads of onnxruntime; 0: all.")
@click.option("--stamps/--no-stamps", default=True, help="Write the image of every object.")
@click.option("--blends", default=4, show_default=True, help="Blends that get a picture of their own.")
@click.option("--force", is_flag=True, help="Go on when the pixels contradict variance or sky subtraction.")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run.")
def deblend(
    out: Path,
    image: tuple[str, ...],
    variance: tuple[str, ...],
    weight: tuple[str, ...],
    psf: tuple[str, ...],
    mask: tuple[str, ...],
    bad_bits: str | None,
    bands: str | None,
    zeropoint: tuple[str, ...],
    pixel_scale: float | None,
    wcs: Path | None,
    peaks: Path | None,
    network: str,
    config: tuple[str, ...],
    threads: int,
    stamps: bool,
    blends: int,
    force: bool,
    overwrite: bool,
) -> None:
    """Deblend FITS images: catalogue, models, stamps, residuals and pictures in OUT.

    Files are given by band, as --image r=FILE, or as one cube or npz file for all bands. FILE[NAME] or
    FILE[2] names an extension.
    """
    import math

    from .adapters.fits_images import read_images
    from .deblender import DeblendConfig
    from .images import deblend_images

    settings = DeblendConfig()
    settings.allowMissingBands = False
    # Peaks that a user gives are all that there is, unless told otherwise.
    settings.findNewPeaks = peaks is None
    _configure(settings, config)
    points = _by_band("--zeropoint", zeropoint)
    images = read_images(
        _by_band("--image", image),
        psf=_by_band("--psf", psf),
        variance=_by_band("--variance", variance),
        weight=_by_band("--weight", weight),
        mask=_by_band("--mask", mask),
        bands=(bands.split(",") if "," in bands else tuple(bands)) if bands else None,
        zeropoint=_numbers("--zeropoint", points),
        pixel_scale=pixel_scale,
        wcs=wcs,
        peaks=peaks,
        bad_bits=None if bad_bits is None else int(bad_bits, 0),
        check=not force,
    )
    bar_ = click.progressbar(length=100, label="deblend", item_show_func=lambda what: what)
    with _quiet("lsst.meas.vaedeblend.network"), bar_ as bar:

        def progress(part: float, what: str) -> None:
            bar.update(math.floor(100 * part) - bar.pos, what)

        summary = deblend_images(
            images,
            out,
            network=network,
            config=settings,
            threads=threads,
            stamps=stamps,
            n_blends=blends,
            overwrite=overwrite,
            progress=progress,
        )
    _echo(summary, skip="bands")
    click.echo(f"Results: {out}")


@main.command()
@click.argument("config", type=_CONFIG)
@click.argument("data", type=_OUTPUT)
@click.option("--processes", default=1, show_default=True, help="Processes that render single blends.")
def simulate(config: Path, data: Path, processes: int) -> None:
    """Render the galaxies of the training configuration CONFIG into DATA."""
    from .simulation.banks import make_banks
    from .simulation.config import load_config

    make_banks(load_config(config), data, processes)


@main.command()
@click.argument("config", type=_CONFIG)
@click.argument("data", type=_DIRECTORY)
@click.argument("run", type=_OUTPUT)
@click.option("--accelerator", default="auto", show_default=True, help="As for lightning: cpu, gpu, auto.")
@click.option("--devices", default="1", show_default=True, help="Number of devices, or their list.")
@click.option("--strategy", default="auto", show_default=True, help="As for lightning, e.g. ddp.")
@click.option("--workers", default=1, show_default=True, help="Processes that compose scenes.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@click.option(
    "--initial", help="First weights of the deblender: a checkpoint, an ONNX file or a shipped name."
)
@click.option("--initial-prior", help="First weights of the prior, likewise.")
@click.option("--step", type=click.Choice(["prior", "deblender"]), help="Run this step alone.")
@click.option(
    "--hours", type=float, help="End each step after so long; the learning rate comes down by then."
)
def train(
    config: Path,
    data: Path,
    run: Path,
    accelerator: str,
    devices: str,
    strategy: str,
    workers: int,
    progress: bool,
    initial: str | None,
    initial_prior: str | None,
    step: str | None,
    hours: float | None,
) -> None:
    """Train prior and deblender of CONFIG on the galaxies in DATA; go on where RUN was left.

    A deblender that is trained alone from other weights (transfer learning) needs no prior: it keeps the
    decoder found there.
    """
    from .network import resolve
    from .simulation.config import load_config
    from .training.fit import fit_step

    options: dict[str, Any] = dict(
        accelerator=accelerator,
        devices=int(devices) if devices.isdigit() else devices,
        strategy=strategy,
        workers=workers,
        progress=progress,
        hours=hours,
        command=_train_command(config.name, step, initial, initial_prior, hours),
    )
    settings = load_config(config)
    starts = (("prior", initial_prior), ("deblender", initial))
    for _, start in starts:
        if start is not None:
            resolve(start)  # what is missing is better known before the first step than after it
    for name, start in starts:
        if step in (None, name):
            checkpoint = fit_step(settings, name, data, run, initial=start, **options)
    click.echo(f"Checkpoint: {checkpoint}")


def _train_command(
    config: str, step: str | None, initial: str | None, initial_prior: str | None, hours: float | None
) -> str:
    """The command of a training as cards have it: with the names of files, not where they happened to lie."""
    given = {"step": step, "initial": initial, "initial-prior": initial_prior, "hours": hours}
    options = "".join(
        f" --{name} {Path(value).name if isinstance(value, str) else value}"
        for name, value in given.items()
        if value is not None
    )
    return f"vaedeblend train config/training/{config} DATA RUN{options}"


@main.command()
@click.argument("config", type=_CONFIG)
@click.argument("data", type=_DIRECTORY)
@click.argument("run", type=_DIRECTORY)
@click.argument("out", type=_OUTPUT)
@click.option(
    "--step",
    type=click.Choice(["prior", "deblender"]),
    default="deblender",
    show_default=True,
    help="Network to export; the prior's files are named NAME_prior.",
)
def export(config: Path, data: Path, run: Path, out: Path, step: str) -> None:
    """Write the network trained in RUN to OUT as ONNX, with its card, after measuring it."""
    from .simulation.config import load_config
    from .training.export import export_network
    from .training.history import run_history

    # The card names the commands with their files' names, not with where they happened to lie.
    name = f"config/training/{config.name}"
    option = "" if step == "deblender" else f" --step {step}"
    settings = load_config(config)
    lines = [f"vaedeblend simulate {name} DATA"]
    for history in run_history(run, settings, step).values():
        lines += [line for line in history["commands"] if line and line not in lines]
    lines.append(f"vaedeblend export {name} DATA RUN OUT{option}")
    path = export_network(settings, data, run, out, "\n".join(lines), step)
    click.echo(f"Network: {path}")


@main.command()
@click.argument("entrants", nargs=-1, required=True)
@click.argument("out", type=_OUTPUT)
@click.option("--truth", help="Field files with truth: a file, or a directory of field_*.npz.")
@click.option("--images", help="What to compare on: field files, or REPO@COLLECTION with the coadds.")
@click.option("--pixel-scale", default=0.2, show_default=True, help="Pixel of field files, arcsec.")
@click.option("--radius", default=3.0, show_default=True, help="Largest distance of a match, pixel.")
@click.option("--network", help="Name or path of the network of REPO's models, if not the one they name.")
def compare(
    entrants: tuple[str, ...],
    out: Path,
    truth: str | None,
    images: str | None,
    pixel_scale: float,
    radius: float,
    network: str | None,
) -> None:
    """Compare deblenders on the same images: verdicts, plots and pictures in OUT/compare.html.

    Each of ENTRANTS is WHAT or NAME=WHAT, where WHAT is a Butler repository with this deblender's outputs
    (REPO@COLLECTION) or a directory with its tables, scarlet files or npz files of stamps (a file, or a
    directory with one for each patch), or sep, which is run.
    """
    from .evaluation.comparison.run import compare as run
    from .evaluation.comparison.run import format_verdict

    comparison = run(
        entrants,
        out,
        images=images,
        truth=truth,
        pixel_scale=pixel_scale,
        radius=radius,
        network=network,
    )
    click.echo(format_verdict(comparison))
    click.echo(f"Report: {out / 'compare.html'}")


@main.group()
def evaluate() -> None:
    """Measure the deblender on simulated fields or on real blends."""


@evaluate.command()
@click.argument("directory", type=_DIRECTORY)
@click.argument("out", type=_OUTPUT)
@click.option("--detect", is_flag=True, help="Find the peaks, instead of starting from the true centres.")
@click.option("--network", default="lsst_ugrizy", show_default=True, help="Name or path of the network.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Threads of onnxruntime; 0: all.",
)
@click.option("-c", "--config", multiple=True, help="Setting of the procedure, as in -c refinementSteps=0.")
@click.option("--stamps", type=_DIRECTORY, help="Score these results of any deblender; deblend nothing.")
def fields(
    directory: Path,
    out: Path,
    detect: bool,
    network: str,
    threads: int,
    config: tuple[str, ...],
    stamps: Path | None,
) -> None:
    """Deblend the field files of DIRECTORY and write each object's image to OUT.

    With --stamps, another deblender's images are scored, and score.json is written to OUT.
    """
    if stamps is not None:
        from .evaluation.comparison.run import score_stamps

        _echo(score_stamps(directory, stamps, out), skip="classes")
        click.echo(f"Numbers of each class of objects: {out / 'score.json'}")
        return

    from .deblender import DeblendConfig
    from .evaluation.fields import evaluate_fields

    settings = DeblendConfig()
    _configure(settings, config)
    summary = evaluate_fields(
        directory, out, network=network, detect=detect, threads=threads, config=settings
    )
    _echo(summary, skip="fields")


@evaluate.command()
@click.argument("directory", type=_DIRECTORY)
@click.argument("out", type=_OUTPUT)
@click.option("--network", default="hsc_grizy", show_default=True, help="Name or path of the network.")
@click.option("-j", "--processes", default=1, show_default=True, help="Processes of pipetask.")
def hsc(directory: Path, out: Path, network: str, processes: int) -> None:
    """Run the HSC blends of DIRECTORY through `pipetask run` and write hsc.json and hsc.png to OUT."""
    from .evaluation.hsc import evaluate_hsc

    summary = evaluate_hsc(directory, out, network=network, processes=processes)
    _echo(summary, skip="blends")


@evaluate.command()
@click.argument("directory", type=_DIRECTORY)
@click.argument("out", type=_OUTPUT)
@click.option("--network", default="hsc_grizy", show_default=True, help="Name or path of the network.")
@click.option("--per-blend", default=3, show_default=True, help="Galaxies for each blend, one at a time.")
@click.option("--seed", default=1, show_default=True, help="Seed of galaxies and positions.")
def injection(directory: Path, out: Path, network: str, per_blend: int, seed: int) -> None:
    """Inject simulated galaxies into the HSC blends of DIRECTORY; write how they come out to OUT."""
    from .evaluation.injection import evaluate_injection

    summary = evaluate_injection(directory, out, network=network, per_blend=per_blend, seed=seed)
    _echo(summary, skip="galaxies")


@evaluate.command()
@click.argument("out", type=_OUTPUT)
@click.option(
    "--configs",
    type=_OUTPUT,
    help="Directory of the configurations arcelin2020_*.py, if not those that ship.",
)
@click.option("--artefacts", type=_DIRECTORY, help="Directory of networks, before those that ship.")
@click.option("--real-catalogue", type=_CONFIG, help="File of a galsim.RealGalaxyCatalog.")
@click.option("--samples", default=6000, show_default=True, help="Images of each test sample.")
@click.option("--galaxies", type=int, help="Galaxies of each test sample, if fewer than the configuration's.")
@click.option("--draws", default=10_000, show_default=True, help="Draws from the posterior of one image.")
@click.option("--threads", default=0, help="Threads of onnxruntime, and processes that render; 0: all cores.")
def paper(
    out: Path,
    configs: Path | None,
    artefacts: Path | None,
    real_catalogue: Path | None,
    samples: int,
    galaxies: int | None,
    draws: int,
    threads: int,
) -> None:
    """Measure the networks of Arcelin et al. (2020) anew: figures and numbers in OUT/paper.html and .json."""
    from .evaluation.paper import evaluate_paper

    summary = evaluate_paper(
        out,
        configs=configs,
        artefacts=artefacts,
        real_catalogue=real_catalogue,
        samples=samples,
        galaxies=galaxies,
        draws=draws,
        threads=threads,
    )
    _echo(summary, skip="table")
    click.echo(f"Report: {out / 'paper.html'}")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger's small talk back, which would tear a progress bar, unless details were asked for."""
    logger = logging.getLogger(name)
    level = logger.level
    if not logger.isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _by_band(option: str, values: tuple[str, ...]) -> Any:
    """Take apart BAND=VALUE: values by band, or the only value, which is for all bands."""
    pairs = [value.partition("=") for value in values]
    # A path may hold an equals sign, a band no slash.
    named = [bool(sign) and "/" not in band for band, sign, _ in pairs]
    if not values:
        return None
    if len(values) == 1 and not named[0]:
        return values[0]
    if not all(named) or len({band for band, _, _ in pairs}) < len(pairs):
        raise ValueError(f"{option} is given once without a band, or once for each BAND=VALUE: {values}.")
    return {band: value for band, _, value in pairs}


def _numbers(option: str, given: Any) -> Any:
    """Turn what `_by_band` gave into numbers."""
    try:
        if isinstance(given, dict):
            return {band: float(value) for band, value in given.items()}
        return None if given is None else float(given)
    except ValueError as error:
        raise ValueError(f"{option} takes numbers: {error}.") from error


def _configure(settings: Any, items: tuple[str, ...]) -> None:
    """Apply NAME=VALUE to settings of the procedure.

    Raises
    ------
    ValueError
        Raised if there is no such setting, or it does not take the value.
    """
    import ast

    for item in items:
        name, _, value = item.partition("=")
        if name not in settings.keys():
            raise ValueError(f"There is no setting {name!r}; there are {', '.join(settings.keys())}.")
        try:
            parsed = ast.literal_eval(value)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"-c {item}: {value!r} is no value; a right form is -c {name}=0.") from error
        settings.update(**{name: parsed})
    settings.validate()


def _echo(summary: dict, skip: str) -> None:
    """Print a summary but for its longest entry."""
    click.echo(json.dumps({key: value for key, value in summary.items() if key != skip}, indent=1))


class _failures:
    """Turn the errors that a user can cause into one line, unless all details were asked for."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        from .network import NetworkError

        in_detail = logging.getLogger("lsst.meas.vaedeblend").isEnabledFor(logging.DEBUG)
        # A pipe that was closed, as by `head`, is click's matter.
        if error is None or in_detail or isinstance(error, BrokenPipeError):
            return
        # Those of other packages are recognised by their names: importing them would import the packages.
        by_name = {"PipetaskError", "MisconfigurationException"}
        if isinstance(error, ModuleNotFoundError):
            raise click.ClickException(_not_installed(error)) from error
        if isinstance(error, NetworkError | OSError | ValueError) or kind.__name__ in by_name:
            raise click.ClickException(str(error)) from error


def _not_installed(error: ModuleNotFoundError) -> str:
    """Say which extra of the package brings a module that is missing."""
    import re
    from importlib.metadata import PackageNotFoundError, requires

    module = (error.name or "").partition(".")[0]
    try:
        requirements = requires("meas_vaedeblend") or []
    except PackageNotFoundError:  # a stack, which has no extras
        requirements = []
    for line in requirements:
        extra = re.search(r"extra == ['\"](\w+)", line)
        if extra and re.split(r"[^\w-]", line)[0].replace("-", "_") == module:
            return f"{module} is not installed: pip install 'meas_vaedeblend[{extra[1]}]'"
    return str(error)

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Speed, memory and accuracy of the deblender, alone or against another checkout.

Each command writes its results to a JSON file and draws the page beside it anew. Times are CPU times of one
thread. Checkouts are compared in processes of their own that take turns, so that ratios hold on a machine
whose speed drifts; the first round of each process, which compiles and fills caches, is not counted.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_scenes
import click
import numpy as np
from bench_accuracy import compare, score_all
from bench_driver import HERE, RESULTS, Checkout, Process, command, exponent, ratios, save, spread
from bench_page import write_page
from lsst.meas.vaedeblend.simulation.fields import simulate_field

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)

KINDS = {
    "A": {"brightest": 20.0, "distances": (0.6, 3.0)},
    "B": {"brightest": 18.5, "distances": (0.4, 2.5)},
}
"""Fields as in doc/experiments/005: ordinary ones, and brighter galaxies with closer neighbours."""

WARM = 250
"""Largest scene that a process warms up with before one that counts; smaller ones are their own."""


class Comparison:
    """The checkouts of one run of a benchmark, and where its results go."""

    def __init__(self, name: str, out: Path, against: Path | None) -> None:
        self.name, self.out = name, out
        self.this = Checkout.of(HERE.parent)
        self.other = Checkout.of(against.resolve()) if against else None
        self._replaced = {str(against): self.other.label} if against and self.other else {}
        self.replace(out)

    def replace(self, path: Path) -> None:
        """Name a path in the command by its last part."""
        self._replaced[str(path)] = path.name

    @property
    def checkouts(self) -> list[Checkout]:
        return [self.this, *([self.other] if self.other else [])]

    @contextlib.contextmanager
    def processes(self, **settings: Any) -> Iterator[list[Process]]:
        """One process for each checkout."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(Process(checkout, **settings)) for checkout in self.checkouts]

    def save(self, results: dict[str, Any]) -> None:
        """Write the results and the page."""
        path = save(self.out, self.name, command(self._replaced), self.this, self.other, results)
        write_page(self.out)
        click.echo(f"Results: {path}")


def _common(function: Callable) -> Callable:
    """The options that all benchmarks have."""
    for option in (
        click.option("--against", type=_DIRECTORY, help="Another checkout to compare with."),
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            default=RESULTS,
            help="Directory of the results.",
        ),
    ):
        function = option(function)
    return function


def _sizes(text: str) -> list[int]:
    return sorted(int(n) for n in text.split(","))


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
def main() -> None:
    pass


@main.command()
@_common
@click.option("--rounds", default=5, show_default=True, help="Rounds that count.")
@click.option("--network", default="lsst_ugrizy", show_default=True, help="Name or path of the network.")
@click.option("--threads", default=1, show_default=True, help="Threads of onnxruntime.")
@click.option("--refinement-steps", type=int, help="Steps of refinement, if not as many as usual.")
def demo(
    against: Path | None, out: Path, rounds: int, network: str, threads: int, refinement_steps: int | None
) -> None:
    """The demonstration's patch: time per object, and in which stages it is spent."""
    comparison = Comparison("demo", out, against)
    settings = {} if refinement_steps is None else {"refinementSteps": refinement_steps}
    options = {"network": network, "threads": threads, "settings": settings}
    with tempfile.TemporaryDirectory() as scratch:
        scene = Path(scratch) / "scene"
        bench_scenes.demonstration(scene)
        with comparison.processes(**options) as processes:
            answers = _take_turns(processes, rounds, lambda process: process("scene", path=str(scene)))
            about = [process("about") for process in processes]
            # From here on clocks are in the way, a little.
            for process in processes:
                process("stages")
            timed = _take_turns(processes, rounds, lambda process: process("scene", path=str(scene)), warm=0)
    per_object = [[1e3 * a["cpu"] / a["objects"] for a in each] for each in answers]
    results: dict[str, Any] = {"rounds": rounds, "checkouts": []}
    for checkout, each, ms, network_, stage_rounds in zip(
        comparison.checkouts, answers, per_object, about, timed, strict=True
    ):
        names = sorted({name for a in stage_rounds for name in a["stages"]})
        stages = {
            name: 1e3 * float(np.median([a["stages"].get(name, 0.0) / a["objects"] for a in stage_rounds]))
            for name in names
        }
        results["checkouts"].append(
            {
                "commit": checkout.label,
                **network_,
                "objects": each[0]["objects"],
                "parents": each[0]["parents"],
                "ms_per_object": spread(ms),
                "ms_to_draw": float(np.median([1e3 * a["draw"] / a["objects"] for a in each])),
                "peak_mb": max(a["peak_mb"] for a in each),
                "stages": dict(sorted(stages.items(), key=lambda item: -item[1])),
                "compiled": _compiled(stages),
            }
        )
    results["ratio"] = ratios(*per_object) if len(per_object) > 1 else None
    comparison.save(results)


def _compiled(stages: dict[str, float]) -> dict[str, float]:
    """Parts of the time inside graphs, and inside graphs and compiled kernels, without and with LAPACK."""
    whole = sum(stages.values())
    graphs = sum(v for name, v in stages.items() if name.startswith("graph:")) / whole
    kernels = sum(v for name, v in stages.items() if name.startswith("kernels")) / whole
    lapack = stages.get("LAPACK", 0.0) / whole
    return {
        "graphs": graphs,
        "graphs and kernels": graphs + kernels,
        "graphs, kernels and LAPACK": graphs + kernels + lapack,
    }


def _take_turns(
    processes: list[Process], rounds: int, work: Callable[[Process], Any], warm: int = 1
) -> list[list[Any]]:
    """Answers of each process, round by round; the first ones are not counted."""
    answers: list[list[Any]] = [[] for _ in processes]
    for number in range(-warm, rounds):
        for process, own in zip(processes, answers, strict=True):
            answer = work(process)
            if number >= 0:
                own.append(answer)
    return answers


@main.command()
@click.argument("directory", type=_DIRECTORY)
@_common
@click.option("--rounds", default=3, show_default=True, help="Rounds that count.")
@click.option("--detect", is_flag=True, help="Find the peaks, instead of starting from the true centres.")
@click.option("--most", type=int, help="Take only the first fields.")
def fields(
    directory: Path, against: Path | None, out: Path, rounds: int, detect: bool, most: int | None
) -> None:
    """The fields field_*.npz of a DIRECTORY: time per object.

    The results have the directory's name.
    """
    comparison = Comparison(directory.resolve().name, out, against)
    comparison.replace(directory)
    files = sorted(directory.glob("field_*.npz"))[:most]
    if not files:
        raise click.UsageError(f"No field_*.npz in {directory}.")
    with comparison.processes() as processes:
        for process in processes:
            process("field", path=str(files[0]), detect=detect)
        times = []
        for path in files * rounds:
            times.append([process("field", path=str(path), detect=detect) for process in processes])
    results: dict[str, Any] = {"kind": "fields", "rounds": rounds, "detect": detect, "checkouts": []}
    per_object = []
    for i, checkout in enumerate(comparison.checkouts):
        own = [row[i] for row in times]
        each = [own[k * len(files) : (k + 1) * len(files)] for k in range(rounds)]
        objects, true = (sum(a[key] for a in each[0]) for key in ("objects", "true"))
        per_object.append([1e3 * sum(a["cpu"] for a in row) / objects for row in each])
        results["checkouts"].append(
            {
                "commit": checkout.label,
                "objects": objects,
                "true": true,
                "ms_per_object": spread(per_object[-1]),
                "ms_per_true": spread([ms * objects / true for ms in per_object[-1]]),
                "fields": {
                    path.stem: {
                        "objects": each[0][k]["objects"],
                        "ms_per_object": float(
                            np.median([1e3 * row[k]["cpu"] / max(row[k]["objects"], 1) for row in each])
                        ),
                    }
                    for k, path in enumerate(files)
                },
            }
        )
    results["ratio"] = ratios(*per_object) if len(per_object) > 1 else None
    comparison.save(results)


@main.command()
@_common
@click.option("--most", default=2000, show_default=True, help="Largest number of objects.")
@click.option("--least", default=125, show_default=True, help="Smallest number; in between it doubles.")
@click.option("--against-most", type=int, help="Largest number for the other checkout, if not the same.")
@click.option("--rounds", default=2, show_default=True, help="Rounds that count.")
def scaling(
    against: Path | None, out: Path, most: int, least: int, against_most: int | None, rounds: int
) -> None:
    """Parts of a patch with more and more objects at one density: time and memory."""
    sizes = [least]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    # The last step may be longer than the others, by up to a half, but not shorter.
    if sizes[-1] < most:
        sizes[-1 if sizes[-1] > most / 1.5 else len(sizes) :] = [most]
    comparison = Comparison("scaling", out, against)
    results = _grow(comparison, sizes, bench_scenes.uniform, against_most, rounds)
    for row in results["checkouts"]:
        n, ms = (np.array([s[key] for s in row["sizes"]]) for key in ("n", "ms_per_object"))
        row["exponent"] = exponent(n.tolist(), (n * ms).tolist())
        row["deviation"] = float(np.abs(ms / np.median(ms) - 1).max())
        row["most_beyond_coadds_mb"] = max(s["peak_mb"] - s["coadd_mb"] for s in row["sizes"])
    comparison.save(results)


@main.command()
@_common
@click.option("--sizes", default="10,30,100,300", show_default=True, help="Numbers of peaks.")
@click.option("--against-most", type=int, help="Largest number for the other checkout, if not the same.")
@click.option("--rounds", default=3, show_default=True, help="Rounds that count.")
def crowded(against: Path | None, out: Path, sizes: str, against_most: int | None, rounds: int) -> None:
    """One parent with more and more peaks: the exponent of time."""
    comparison = Comparison("crowded", out, against)
    results = _grow(comparison, _sizes(sizes), bench_scenes.crowded, against_most, rounds)
    for row in results["checkouts"]:
        n = [s["n"] for s in row["sizes"]]
        row["exponent"] = exponent(n, [s["seconds"]["median"] for s in row["sizes"]])
    comparison.save(results)


def _grow(
    comparison: Comparison,
    sizes: list[int],
    make: Callable[[Path, int, int], None],
    against_most: int | None,
    rounds: int,
) -> dict[str, Any]:
    """Time and memory for scenes of several sizes, other ones in each round, each in a process of its own."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    results: dict[str, Any] = {"rounds": rounds, "checkouts": [], "ratio": {}}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            scenes = {n: Path(scratch) / str(n) for n in sizes}
            for n, path in scenes.items():
                make(path, n, number)
            for n, path in scenes.items():
                warm = scenes[max((m for m in sizes if m <= min(n, WARM)), default=sizes[0])]
                for i, checkout in enumerate(comparison.checkouts):
                    if i and against_most is not None and n > against_most:
                        continue
                    with Process(checkout) as process:
                        process("scene", path=str(warm))
                        answer = process("scene", path=str(path))
                    found.setdefault((i, n), []).append(answer)
                    click.echo(f"{checkout.label}: {n} objects, {answer['cpu']:.2f} s")
    for i, checkout in enumerate(comparison.checkouts):
        rows = []
        for n in sizes:
            if answers := found.get((i, n)):
                seconds = spread([a["cpu"] for a in answers])
                rows.append(
                    {
                        "n": n,
                        "parents": answers[0]["parents"],
                        "seconds": seconds,
                        "ms_per_object": 1e3 * seconds["median"] / n,
                        "peak_mb": max(a["peak_mb"] for a in answers),
                        "coadd_mb": answers[0]["coadd_mb"],
                    }
                )
        results["checkouts"].append({"commit": checkout.label, "sizes": rows})
    for n in sizes:
        if (1, n) in found:
            pairs = [[a["cpu"] for a in found[i, n]] for i in (0, 1)]
            results["ratio"][n] = ratios(*pairs)
    return results


@main.command()
@_common
@click.option("--fields", "count", default=16, show_default=True, help="Fields of each kind.")
@click.option(
    "--seeds",
    type=(int, int),
    default=(41, 42),
    show_default=True,
    help="Seeds of the two kinds. Settings were chosen on fields of seeds 5, 9 and 77.",
)
def accuracy(against: Path | None, out: Path, count: int, seeds: tuple[int, int]) -> None:
    """Fluxes, shapes and their intervals on held-out fields of two kinds, from the true centres."""
    comparison = Comparison("accuracy", out, against)
    results: dict[str, Any] = {"commits": [c.label for c in comparison.checkouts], "kinds": {}}
    together: list[list[Any]] = [[] for _ in comparison.checkouts]
    with tempfile.TemporaryDirectory() as scratch, comparison.processes() as processes:
        for (kind, how), seed in zip(KINDS.items(), seeds, strict=True):
            directory = Path(scratch) / kind
            directory.mkdir()
            for number in range(count):
                np.savez(directory / f"field_{number:03d}.npz", **simulate_field(seed, number, **how))
            scores = []
            for number, process in enumerate(processes):
                models = Path(scratch) / f"{kind}{number}"
                summary = process("evaluate", path=str(directory), out=str(models))
                scores.append(score_all(directory, models, summary))
                together[number] += scores[-1]
            results["kinds"][kind] = {"seed": seed, **how, **compare(scores)}
    results["kinds"]["A and B"] = compare(together)
    comparison.save(results)


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory of the results.",
)
def page(out: Path) -> None:
    """Draw the page anew from the results that are there."""
    click.echo(f"Page: {write_page(out)}")


if __name__ == "__main__":
    main()

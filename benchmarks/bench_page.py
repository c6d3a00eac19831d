# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The page of results of `bench.py`, and its plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lsst.meas.vaedeblend.evaluation.figures import new_figure
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = ("tab:blue", "tab:orange")
MOST_BEYOND_COADDS = 2048
"""Memory wanted beyond the coadds at the most, MiB."""


def write_page(directory: Path) -> Path:
    """Write ``index.md`` and the plots for all results of a directory.

    Parameters
    ----------
    directory : `pathlib.Path`
        Directory with the files of results.

    Returns
    -------
    path : `pathlib.Path`
        The page.
    """
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    known = {"demo": _demo, "scaling": _scaling, "crowded": _crowded, "accuracy": _accuracy}
    order = [name for name in known if name in documents]
    # Whatever else there is are fields, under the name of their directory.
    order[1:1] = [name for name, d in documents.items() if d["results"].get("kind") == "fields"]
    lines = ["# Benchmarks", "", "Written by `benchmarks/bench.py`; see `doc/benchmarks.md`.", ""]
    for name in order:
        document = documents[name]
        title, text, figure = known.get(name, _fields)(document)
        figure.savefig(directory / f"{name}.png", dpi=110)
        versions = ", ".join(f"{package} {number}" for package, number in document["versions"].items())
        lines += [f"## {title}", "", f"`{document['command']}`", ""]
        lines += [f"On {document['processor']}, {document['cores']} cores, one thread; {versions}.", ""]
        lines += [*text, "", f"![{title}]({name}.png)", ""]
    path = directory / "index.md"
    path.write_text("\n".join(lines))
    return path


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    if abs(value) < 1e-3:
        return "0"
    return f"{value:.{max(digits - 1 - int(np.floor(np.log10(abs(value)))), 0)}f}"


def _spread(values: dict[str, float] | None) -> str:
    if values is None:
        return ""
    return f"{_number(values['median'])} ({_number(values['least'])} to {_number(values['largest'])})"


def _labels(document: dict[str, Any]) -> list[str]:
    return [label for label in (document["commit"], document["against"]) if label]


def _log_ticks(axis) -> None:
    """Ticks at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _demo(document: dict[str, Any]) -> tuple[str, list[str], Figure]:
    results = document["results"]
    rows = []
    for row in results["checkouts"]:
        rows.append(
            [
                row["commit"],
                str(row["objects"]),
                str(row["parents"]),
                _spread(row["ms_per_object"]),
                _number(row["ms_to_draw"]),
                *(f"{100 * row['compiled'][key]:.0f} %" for key in row["compiled"]),
                f"{row['peak_mb']:.0f}",
            ]
        )
    parts = list(results["checkouts"][0]["compiled"])
    header = [
        "",
        "objects",
        "parents",
        "CPU ms per object",
        "to draw models afterwards",
        *(f"inside {key}" for key in parts),
        "peak memory, MiB",
    ]
    text = [
        f"Medians of {results['rounds']} rounds, in brackets the least and the largest. Wanted: at least "
        "half inside graphs and kernels; at most 1/6 of 65bb5a2, 1/10 is the aim.",
        "",
        *_table(header, rows),
    ]
    if results["ratio"]:
        text += ["", f"{document['against']} takes {_spread(results['ratio'])} times as long."]
    longest: dict[str, float] = {}
    for row in results["checkouts"]:
        for name, ms in row["stages"].items():
            longest[name] = max(ms, longest.get(name, 0.0))
    names = sorted(longest, key=lambda name: -longest[name])
    stages = [[row["stages"].get(name) for row in results["checkouts"]] for name in names]
    text += [
        "",
        "Milliseconds per object by stage, not counting other stages that it calls; clocks running:",
        "",
    ]
    table = [[name, *map(_number, values)] for name, values in zip(names, stages, strict=True)]
    text += _table(["stage", *_labels(document)], table)

    figure = new_figure(8.0, 1.2 + 0.32 * len(names))
    axes = figure.subplots()
    height = 0.8 / len(results["checkouts"])
    for i, row in enumerate(results["checkouts"]):
        place = np.arange(len(names)) + (i - (len(results["checkouts"]) - 1) / 2) * height
        values = [row["stages"].get(name, 0.0) for name in names]
        bars = axes.barh(place, values, height, color=COLOURS[i], label=row["commit"])
        axes.bar_label(bars, [f"{v:.2g}" if v else "" for v in values], fontsize=7, padding=2)
    axes.set_yticks(np.arange(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("CPU time per object, ms")
    axes.legend(loc="lower right")
    return "Demonstration", text, figure


def _fields(document: dict[str, Any]) -> tuple[str, list[str], Figure]:
    results = document["results"]
    rows = [
        [
            row["commit"],
            str(row["objects"]),
            str(row["true"]),
            _spread(row["ms_per_object"]),
            _spread(row["ms_per_true"]),
        ]
        for row in results["checkouts"]
    ]
    header = ["", "objects", "true sources", "CPU ms per object", "per true source"]
    peaks = "peaks found" if results["detect"] else "true centres given"
    text = [
        f"Medians of {results['rounds']} rounds, in brackets the least and the largest; {peaks}. Wanted on "
        "fields_sky: at most 1/12 of 65bb5a2.",
        "",
        *_table(header, rows),
    ]
    if results["ratio"]:
        text += ["", f"Per object {document['against']} takes {_spread(results['ratio'])} times as long."]
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for i, row in enumerate(results["checkouts"]):
        objects, ms = zip(*((f["objects"], f["ms_per_object"]) for f in row["fields"].values()), strict=True)
        axes.scatter(objects, ms, s=18, color=COLOURS[i], label=row["commit"])
    axes.set_xlabel("objects of a field")
    axes.set_ylabel("CPU time per object, ms")
    axes.set_yscale("log")
    _log_ticks(axes.yaxis)
    axes.legend()
    return f"Fields: {document['benchmark']}", text, figure


def _growth(
    document: dict[str, Any], axes, powers: Sequence[tuple[float, str]], what: str
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Draw times against sizes, with power laws through the first time."""
    curves = [(row["commit"], row["sizes"]) for row in document["results"]["checkouts"] if row["sizes"]]
    for i, (label, sizes) in enumerate(curves):
        n = np.array([s["n"] for s in sizes])
        seconds = [s["seconds"] for s in sizes]
        middle = np.array([s["median"] for s in seconds])
        low, high = (np.array([s[key] for s in seconds]) for key in ("least", "largest"))
        axes.errorbar(n, middle, [middle - low, high - middle], fmt="o-", ms=4, color=COLOURS[i], label=label)
        for power, style in powers:
            name = f"$n^{{{power:g}}}$" if power != 1 else "$n$"
            axes.plot(
                n, middle[0] * (n / n[0]) ** power, style, color="grey", lw=0.9, label=None if i else name
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({s["n"] for _, sizes in curves for s in sizes})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _log_ticks(axes.yaxis)
    axes.set_xlabel(what)
    axes.set_ylabel("CPU time, s")
    axes.legend(fontsize=8)
    return curves


def _growth_table(document: dict[str, Any]) -> list[str]:
    results = document["results"]
    rows = []
    for row in results["checkouts"]:
        for s in row["sizes"]:
            ratio = results["ratio"].get(str(s["n"])) if row["commit"] == document["commit"] else None
            rows.append(
                [
                    row["commit"],
                    str(s["n"]),
                    str(s["parents"]),
                    _spread(s["seconds"]),
                    _number(s["ms_per_object"]),
                    f"{s['peak_mb']:.0f}",
                    f"{s['peak_mb'] - s['coadd_mb']:.0f}",
                    _spread(ratio),
                ]
            )
    last = f"{document['against']} takes, times" if document["against"] else ""
    header = ["", "objects", "parents", "CPU s", "ms per object", "peak MiB", "beyond coadds", last]
    if not last:
        header, rows = header[:-1], [row[:-1] for row in rows]
    return _table(header, rows)


def _scaling(document: dict[str, Any]) -> tuple[str, list[str], Figure]:
    results = document["results"]
    rows = [
        [
            row["commit"],
            _number(row["exponent"]),
            f"{100 * row['deviation']:.0f} %",
            f"{row['most_beyond_coadds_mb']:.0f}",
        ]
        for row in results["checkouts"]
        if row["sizes"]
    ]
    header = ["", "exponent of time", "largest deviation from linear", "most memory beyond the coadds, MiB"]
    text = [
        "Six bands, given peaks, 10 000 objects on 3300 x 3300 pixels and as many per pixel on smaller "
        "parts. Coadds are image, variance and mask. The deviation is that of the time per object from its "
        f"median over sizes. Medians of {results['rounds']} scenes, in brackets the least and the largest. "
        f"Wanted: linear within 20 %, memory at most the coadds and {MOST_BEYOND_COADDS} MiB.",
        "",
        *_table(header, rows),
        "",
        *_growth_table(document),
    ]
    figure = new_figure(9.0, 3.8)
    time, memory = figure.subplots(1, 2)
    curves = _growth(document, time, [(1, "--")], "objects")
    for i, (label, sizes) in enumerate(curves):
        beyond = [s["peak_mb"] - s["coadd_mb"] for s in sizes]
        memory.plot([s["n"] for s in sizes], beyond, "o-", ms=4, color=COLOURS[i], label=label)
    memory.axhline(MOST_BEYOND_COADDS, color="grey", ls="--", lw=0.9, label="wanted at most")
    memory.set_ylim(0, None)
    memory.set_xlabel("objects")
    memory.set_ylabel("peak memory less the coadds, MiB")
    memory.legend(fontsize=8, loc="center right")
    return "Scaling", text, figure


def _crowded(document: dict[str, Any]) -> tuple[str, list[str], Figure]:
    results = document["results"]
    rows = [[row["commit"], _number(row["exponent"])] for row in results["checkouts"] if row["sizes"]]
    text = [
        "One parent, given peaks 12 pixels from each other on average. Medians of "
        f"{results['rounds']} scenes, in brackets the least and the largest. Wanted: at most 1.5.",
        "",
        *_table(["", "exponent of time"], rows),
        "",
        *_growth_table(document),
    ]
    figure = new_figure(5.5, 3.8)
    _growth(document, figure.subplots(), [(1, "--"), (1.5, ":")], "peaks of the parent")
    return "Crowded parent", text, figure


def _accuracy(document: dict[str, Any]) -> tuple[str, list[str], Figure]:
    kinds, labels = document["results"]["kinds"], document["results"]["commits"]

    def pair(cell: dict[str, float]) -> str:
        value, error = cell["value"], cell["error"]
        shown = "" if value is None else f"{value:.4f}"
        return shown if error is None else f"{shown} ± {error:.4f}"

    text = [
        "Held-out fields of our own, true centres given, galaxies with S/N > 10, reference band. A are "
        "ordinary fields, B have brighter galaxies and closer neighbours. Errors are those of drawing the "
        "fields anew; of differences, with both checkouts on the same fields. Flux errors are cut at 5 in "
        "the mean. Ellipticities are KSB's. Coverage is that of 68 percent intervals.",
    ]
    for kind, row in kinds.items():
        body = []
        for name in row["checkouts"][0]:
            cells = [pair(c[name]) for c in row["checkouts"]]
            body.append([name, *cells, *([pair(row["difference"][name])] if row["difference"] else [])])
        header = ["", *labels, *(["difference"] if row["difference"] else [])]
        seed = f", seed {row['seed']}" if "seed" in row else ""
        text += ["", f"### {kind}", "", f"{row['fields']} fields{seed}, {row['galaxies']} galaxies.", ""]
        text += _table(header, body)
    names = list(next(iter(kinds.values()))["checkouts"][0])
    figure = new_figure(11.0, 4.8)
    panels = figure.subplots(2, -(-len(names) // 2)).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        for i, label in enumerate(labels):
            cells = [row["checkouts"][i][name] for row in kinds.values()]
            place = np.arange(len(kinds)) + 0.15 * (i - (len(labels) - 1) / 2)
            value, error = (np.array([c[key] for c in cells], float) for key in ("value", "error"))
            axes.errorbar(
                place, value, np.nan_to_num(error), fmt="o", ms=4, capsize=2, color=COLOURS[i], label=label
            )
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(kinds)), list(kinds), fontsize=8)
        axes.set_xlim(-0.5, len(kinds) - 0.5)
        if "coverage" in name:
            axes.axhline(0.683, color="grey", lw=0.8, ls="--")
    handles, shown = panels[0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside lower center", ncols=2, fontsize=8)
    return "Accuracy", text, figure

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report: one HTML file that holds all it shows. What comes from input files is escaped."""

from __future__ import annotations

__all__ = ["disagreements", "write_report"]

import base64
import hashlib
import html
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import SNR_LIMIT
from .entrants import Entrant
from .measures import APERTURE
from .patches import Patch
from .pictures import COLOURS, HALF, Cutouts, plots
from .result import Comparison, _pick
from .statistics import CLASSES, MIN_COUNT, REPEATS, SIGNIFICANT, Verdict

N_WORST = 20
"""Objects shown as pictures."""

MAX_ROWS = 500
"""Rows of the table of objects; all of them are in the tables beside the report."""

_TRUTH_COLOUR = "#ffffff"

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1b1f24;max-width:86rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.25rem;margin:2rem 0 .4rem;border-bottom:2px solid #ccd}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p{margin:.4rem 0;max-width:52rem}
nav a{margin-right:1rem}.wide{overflow-x:auto;max-width:100%}.tall{max-height:34rem;overflow:auto}
table{border-collapse:collapse;font-size:.88rem}th,td{padding:.2rem .45rem;border-bottom:1px solid #dde}
th{text-align:right;vertical-align:bottom;background:#eef1f6;position:sticky;top:0;z-index:1}
td{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0}
td:first-child{white-space:normal;min-width:8rem;max-width:22rem;background:#fff}
th:first-child{z-index:2}
th button{font:inherit;font-weight:bold;text-align:inherit;background:none;border:0;padding:0;cursor:pointer}
td.same{color:#666}.win0{background:#dcebf7}.win1{background:#fbe3d3}.win2{background:#d8f0e7}
.win3{background:#f6e3ee}.win4{background:#e2f2fb}.win5{background:#fbefd3}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.plots figure{margin:0}
.plots img{width:100%;height:auto}figcaption{font-size:.82rem;color:#444}
.cuts{display:flex;flex-wrap:wrap;gap:.4rem}.cuts figure{margin:0;width:8.6rem}
.cut{position:relative;width:8.6rem;height:8.6rem;background:#000}
.cut img,.cut svg{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated}
article{border-top:1px solid #ccd;padding:.5rem 0}article:target{background:#fffbe0}
summary{cursor:pointer;font-weight:600;margin:.5rem 0}
"""

_SCRIPT = """
document.querySelectorAll('table.sortable th button').forEach(function (button) {
  button.addEventListener('click', function () {
    var th = button.parentNode, row = th.parentNode, table = row.closest('table');
    var column = Array.prototype.indexOf.call(row.children, th), body = table.tBodies[0];
    var up = th.getAttribute('aria-sort') !== 'ascending';
    row.querySelectorAll('th').forEach(function (other) { other.removeAttribute('aria-sort'); });
    th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    var value = function (tr) {
      var td = tr.children[column];
      return td.dataset.v === undefined ? td.textContent : parseFloat(td.dataset.v);
    };
    var unknown = function (v) { return typeof v === 'number' && isNaN(v); };
    Array.prototype.slice.call(body.rows).sort(function (a, b) {
      var x = value(a), y = value(b);
      if (unknown(x) || unknown(y)) { return unknown(x) - unknown(y); }
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    }).forEach(function (tr) { body.appendChild(tr); });
  });
});
"""

_escape = html.escape


def _number(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "–"
    if value and abs(value) >= 1e4:
        return f"{value:,.0f}".replace(",", " ")
    if value and abs(value) < 1e-3:
        return f"{value:.{digits}g}"
    return f"{value:.{digits}f}" if digits else f"{value:.0f}"


def _with_error(value: float, error: float) -> str:
    """A value to the second digit of its error."""
    if not math.isfinite(value):
        return "–"
    if not math.isfinite(error):
        return f"{_number(value)} ± ?"
    decimals = 3 if error == 0 else int(np.clip(1 - math.floor(math.log10(error)), 0, 6))
    text = f"{value:.{decimals}f}"
    # There is no -0.
    text = text.removeprefix("-") if float(text) == 0 else text
    return f"{text} ± {error:.{decimals}f}"


def _cell(text: str, value: float | None = None, kind: str = "") -> str:
    extra = f" class='{kind}'" if kind else ""
    if value is not None:
        extra += f" data-v='{value if math.isfinite(value) else 'NaN'}'"
    return f"<td{extra}>{text}</td>"


def _table(header: Sequence[str], rows: Iterable[str], sortable: bool = False, tall: bool = False) -> str:
    """A table of headings (plain text) and rows (markup of their cells)."""
    head = "".join(
        f"<th><button type='button'>{_escape(h)}</button></th>" if sortable else f"<th>{_escape(h)}</th>"
        for h in header
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    kind = " class='sortable'" if sortable else ""
    outer = "wide tall" if tall else "wide"
    return (
        f"<div class='{outer}'><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _picture(png: bytes, alt: str) -> str:
    return f"<img alt='{_escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def write_report(
    path: str | os.PathLike[str],
    comparison: Comparison,
    patches: Sequence[Patch],
    entrants: Sequence[Sequence[Entrant]],
) -> None:
    """Write the report.

    Parameters
    ----------
    path : path-like
        The HTML file.
    comparison : `Comparison`
        What was found.
    patches, entrants
        What it was found on, as given to `compare_entrants`, for the pictures.
    """
    Path(path).write_text(render_report(comparison, patches, entrants), encoding="utf-8")


def render_report(
    comparison: Comparison, patches: Sequence[Patch], entrants: Sequence[Sequence[Entrant]]
) -> str:
    """Make the text of the report; parameters as of `write_report`."""
    c = comparison
    worst = disagreements(c)
    title = " against ".join(c.names)
    # Nothing but this script may run, and nothing may be loaded: not even what an input file smuggled in.
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    patches_text = f"{len(c.patches)} patch{'es' if len(c.patches) > 1 else ''}"
    known = "with truth" if c.true is not None else "without truth"
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        # A browser asks for an icon otherwise.
        "<link rel='icon' href='data:,'>",
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_escape(title)}</h1>",
        f"<p>{patches_text} {known}, bands {_escape(' '.join(c.bands))}; what is of one band is of "
        f"{_escape(c.band)}. Objects match within {c.radius:g} pixels. "
        f"Errors are of {REPEATS} bootstrap samples; a difference counts from {SIGNIFICANT:g} standard "
        "errors on, so that one in twenty is by chance.</p>",
        "<nav><a href='#verdict'>Verdict</a><a href='#fates'>Objects and costs</a>"
        "<a href='#differences'>Differences</a><a href='#plots'>Plots</a>"
        "<a href='#worst'>Worst disagreements</a><a href='#objects'>Table</a>"
        "<a href='#method'>Definitions</a></nav>",
        "<h2 id='verdict'>Verdict</h2>",
        *_verdicts(c, entrants),
        "<h2 id='fates'>Objects and costs</h2>",
        *_fates(c),
        "<h2 id='differences'>Differences without regard to truth</h2>",
        *_differences(c),
        "<h2 id='plots'>Plots</h2><div class='plots'>",
    ]
    for plot in plots(c):
        text = f"<b>{_escape(plot.title)}.</b> {_escape(plot.text)}"
        parts.append(f"<figure>{_picture(plot.png, plot.title)}<figcaption>{text}</figcaption></figure>")
    parts.append("</div>")
    parts += _worst(c, worst[:N_WORST], patches, entrants)
    parts += _objects(c, worst)
    parts += _method(c)
    return "\n".join([*parts, f"<script>{_SCRIPT}</script></body></html>"]) + "\n"


def _decision(names: Sequence[str], row: dict[str, Any], few: bool = True) -> str:
    """A table's cell: who is better, and by how much."""
    size = _with_error(abs(row["difference"]), row["error"])
    if not math.isfinite(row["difference"]) or (few and row["n"] < MIN_COUNT):
        return _cell(f"not known ({row['n']} in common)", None, "same")
    if not row["better"]:
        return _cell(f"no difference ({size})", None, "same")
    winner = row[row["better"]]
    return _cell(f"<b>{_escape(names[winner])}</b> by {size}", None, f"win{winner % len(COLOURS)}")


def _verdicts(c: Comparison, entrants: Sequence[Sequence[Entrant]]) -> list[str]:
    parts = []
    given = [own[0].name for own in entrants if own[0].truth_row is not None]
    if c.true is None:
        parts.append(
            "<p>Without truth nobody can say whose fluxes, colours and shapes are right: the differences are "
            "below. What can be judged is the light that is left over where both have an object.</p>"
        )
    elif "all" in c.verdicts:
        for line in _in_words(c.names, c.verdicts["all"][1]):
            parts.append(f"<p>{line}</p>")
    if c.true is not None and given:
        parts.append(
            f"<p>{_escape(' and '.join(given))} started from the true centres, or came matched with them: "
            "what they found is no achievement.</p>"
        )
    for name, (label, _) in CLASSES.items():
        if name not in c.verdicts:
            continue
        n, verdicts = c.verdicts[name]
        table = _verdict_table(c, verdicts)
        heading = f"True objects with {label}" if name not in ("stars", "galaxies") else f"True {label}"
        heading = f"{_escape(heading)}: {n}"
        if name == "all":
            parts.append(
                "<p>A deblender's numbers are of the objects that it found itself, easy ones if it misses "
                "the others; who is better is decided on the objects that both of a pair found.</p>"
            )
            parts.append(f"<h3>{heading}</h3>{table}")
        else:
            parts.append(f"<details><summary>{heading}</summary>{table}</details>")
    residuals = [row for row in c.residual_verdicts() if row["n"] >= MIN_COUNT]
    if residuals:
        rows = []
        for row in residuals:
            names = [c.names[row["first"]], c.names[row["second"]]]
            cells = _cell(f"{_escape(names[0])} and {_escape(names[1])}") + _cell(str(row["n"]))
            cells += "".join(_cell(_with_error(*value)) for value in row["values"])
            rows.append(cells + _decision(c.names, row))
        parts.append("<h3>Residuals: median chi-square in the aperture, of objects that both have</h3>")
        parts.append(_table(["pair", "objects", "first", "second", "less residual"], rows))
        parts.append(
            "<p>A smaller chi-square says that the models account for more of the light, noise included; it "
            "does not say that the light was given to the right object.</p>"
        )
    if c.coverages:
        rows = []
        for cover in c.coverages:
            cells = _cell(f"{_escape(c.names[cover['entrant']])}, {_escape(cover['band'])}")
            cells += _cell(str(cover["n"]), cover["n"])
            for key in ("median", "nmad"):
                cells += _cell(_with_error(*cover[key]), cover[key][0])
            inside, error = cover["inside"]
            rows.append(cells + _cell(f"{_with_error(100 * inside, 100 * error)} %", inside))
        parts.append(f"<h3>Do the errors of the fluxes mean what they say? S/N above {SNR_LIMIT:g}</h3>")
        parts.append(
            _table(
                ["deblender, band", "objects", "pull, median (0)", "pull, NMAD (1)", "within 1 sigma (68 %)"],
                rows,
                sortable=True,
            )
        )
    if not (c.verdicts or residuals):
        parts.append(
            f"<p>No verdict: fewer than {MIN_COUNT} objects that a pair has in common and that both have "
            "models of, rather than pixels of the coadd, which leave no residual.</p>"
        )
    return parts


def _in_words(names: Sequence[str], verdicts: Sequence[Verdict]) -> list[str]:
    """One sentence for each pair."""
    lines = []
    for p, pair in enumerate(verdicts[0].pairs):
        first, second = (_escape(names[pair[side]]) for side in ("first", "second"))
        outcomes = [v.pairs[p] for v in verdicts]
        better = {side: sum(o["better"] == side for o in outcomes) for side in ("first", "second")}
        same = len(outcomes) - better["first"] - better["second"]
        lines.append(
            f"<b>{first}</b> is better than <b>{second}</b> in {better['first']} of {len(outcomes)} numbers, "
            f"worse in {better['second']}, and in {same} there is no difference or none is known."
        )
    return lines


def _verdict_table(c: Comparison, verdicts: Sequence[Verdict]) -> str:
    header = ["", *c.names]
    # The first quantity is what was found, of all objects; the others are of those that both found.
    for pair in verdicts[-1].pairs:
        header.append(f"{c.names[pair['first']]} or {c.names[pair['second']]}? ({pair['n']} both)")
    rows = []
    for v in verdicts:
        cells = _cell(_escape(v.label))
        for value, error in zip(v.value, v.error, strict=True):
            cells += _cell(_with_error(value, error))
        cells += "".join(_decision(c.names, pair) for pair in v.pairs)
        rows.append(cells)
    return _table(header, rows)


def _fates(c: Comparison) -> list[str]:
    header = ["deblender", "objects", "seconds per object", "bytes per object", "median chi-square"]
    if c.true is not None:
        header += ["true ones matched", "merged", "missed", "split", "false"]
    rows = []
    for k, (name, cost) in enumerate(zip(c.names, c.costs, strict=True)):
        cells = _cell(_escape(name)) + _cell(str(cost["objects"]))
        cells += _cell(_number(cost["seconds"])) + _cell(_number(cost["bytes"], 0))
        cells += _cell(_with_error(*cost["chi2"]))
        if c.true is not None:
            for key in ("matched", "merged", "missed", "split", "added"):
                count = c.fates[k][key]
                cells += _cell("–" if count is None else str(count))
        rows.append(cells)
    parts = [_table(header, rows)]
    rows = []
    for pair in c.pairs:
        cells = _cell(f"{_escape(c.names[pair.first])} and {_escape(c.names[pair.second])}")
        for key in ("matched", "merged", "missed", "split", "added"):
            cells += _cell(str(pair.counts[key]))
        rows.append(cells)
    parts.append("<h3>The second's objects as the first sees them</h3>")
    parts.append(
        _table(["pair", "matched", "merged in the second", "missed", "split in the second", "added"], rows)
    )
    parts.append(
        "<p>Merged: without a partner, but with a matched object of the other list within twice the matching "
        "radius; missed: without any. Split and added are the same seen from the other side. A dash stands "
        "for what is not known; the chi-square is of deblenders with models, S/N above "
        f"{SNR_LIMIT:g}.</p>"
    )
    return parts


def _differences(c: Comparison) -> list[str]:
    parts = [
        f"<p>Matched objects to which the first deblender gives a S/N above {SNR_LIMIT:g}: the second's "
        "value over, or minus, the first's. The redistributed coadd is what measurement sees: each pixel's "
        "light, shared out as the models say.</p>"
    ]
    for k, pair in enumerate(c.pairs):
        rows = []
        for d in pair.differences:
            cells = _cell(_escape(d["what"])) + _cell(str(d["n"]), d["n"])
            for key in ("median", "nmad", "off_by_half"):
                cells += _cell(_with_error(*d[key]), d[key][0]) if key in d else _cell("", math.nan)
            rows.append(cells)
        table = _table(["", "objects", "median", "NMAD", "share off by a half"], rows, sortable=True)
        title = f"{_escape(c.names[pair.second])} against {_escape(c.names[pair.first])}"
        state = " open" if k == 0 else ""
        parts.append(f"<details{state}><summary>{title}</summary>{table}</details>")
    return parts


def disagreements(c: Comparison) -> list[dict[str, Any]]:
    """List the objects of the first two entrants, those about which they disagree most first.

    Parameters
    ----------
    c : `Comparison`
        The comparison.

    Returns
    -------
    objects : `list` [`dict`]
        With ``patch``, ``rows`` (of every entrant, -1 where it has none), ``truth_row`` (-1 without), ``x``,
        ``y`` (scene coordinates), ``snr``, ``mag``, ``disagreement`` (1 for an object that one of the two
        lacks), ``status``, and ``pair``, the row of the pairs' columns or -1. Objects with a signal-to-noise
        ratio above `SNR_LIMIT` come first. Of the first `N_WORST` no more than half are lonely.
    """
    pair = c.pairs[0]
    two = pair.first, pair.second
    made = []
    k = pair.columns
    for n in range(len(k["snr"])):
        made.append(_entry(c, int(k["patch"][n]), [int(k["first"][n]), int(k["second"][n])], n, "matched"))
    lonely = pair.lonely
    words = {(0, True): "merged", (0, False): "missed", (1, True): "split", (1, False): "added"}
    for n in range(len(lonely["row"])):
        side = int(lonely["side"][n])
        rows = [-1, -1]
        rows[side] = int(lonely["row"][n])
        made.append(_entry(c, int(lonely["patch"][n]), rows, -1, words[side, bool(lonely["beside"][n])]))
    _find_others(c, made, two)
    made.sort(key=lambda e: (not e["snr"] > SNR_LIMIT, -np.nan_to_num(e["disagreement"]), -e["snr"]))
    top: list[dict[str, Any]] = []
    kept_back = []
    alone = 0
    for entry in made:
        lone = entry["pair"] < 0
        if len(top) < N_WORST and (not lone or alone < N_WORST // 2):
            top.append(entry)
            alone += lone
        else:
            kept_back.append(entry)
    return top + kept_back


def _entry(c: Comparison, patch: int, rows: list[int], number: int, status: str) -> dict[str, Any]:
    pair = c.pairs[0]
    k, row = (pair.first, rows[0]) if rows[0] >= 0 else (pair.second, rows[1])
    columns = c.objects[k]
    at = int(np.searchsorted(columns["patch"], patch)) + row
    return {
        "patch": patch,
        "rows": [-1] * len(c.names),
        "pair_rows": rows,
        "truth_row": -1,
        "x": float(columns["x"][at]),
        "y": float(columns["y"][at]),
        "snr": float(columns["snr"][at]),
        "mag": float(columns["mag"][at]),
        "disagreement": float(pair.columns["disagreement"][number]) if number >= 0 else 1.0,
        "status": status,
        "pair": number,
        "id": int(columns["id"][at]),
    }


def _find_others(c: Comparison, entries: list[dict[str, Any]], two: tuple[int, int]) -> None:
    """Fill in each object's row of the truth and of the other entrants."""
    truth_of = [_truth_rows(c, k) for k in range(len(c.names))] if c.true is not None else []
    partners: dict[int, dict[tuple[int, int], int]] = {}
    for pair in c.pairs[1:]:
        if pair.first == two[0]:
            keys = zip(pair.columns["patch"].tolist(), pair.columns["first"].tolist(), strict=True)
            partners[pair.second] = dict(zip(keys, pair.columns["second"].tolist(), strict=True))
    for entry in entries:
        for k, row in zip(two, entry["pair_rows"], strict=True):
            entry["rows"][k] = row
            if row >= 0 and truth_of and entry["truth_row"] < 0:
                entry["truth_row"] = truth_of[k].get((entry["patch"], row), -1)
        for k, lookup in partners.items():
            entry["rows"][k] = lookup.get((entry["patch"], entry["pair_rows"][0]), -1)


def _truth_rows(c: Comparison, k: int) -> dict[tuple[int, int], int]:
    assert c.true is not None
    rows = c.errors[k]["row"]
    found = np.flatnonzero(rows >= 0)
    return {(int(c.true["patch"][t]), int(rows[t])): int(c.true["row"][t]) for t in found}


def _truth_index(c: Comparison, entry: dict[str, Any]) -> int:
    """Row of an object in the joint columns of the truth, or -1."""
    if c.true is None or entry["truth_row"] < 0:
        return -1
    return int(np.searchsorted(c.true["patch"], entry["patch"])) + entry["truth_row"]


def _anchor(number: int) -> str:
    return f"object-{number}"


def _name(c: Comparison, entry: dict[str, Any]) -> str:
    return f"{c.patches[entry['patch']]}, object {entry['id']} at ({entry['x']:.1f}, {entry['y']:.1f})"


def _worst(
    c: Comparison,
    worst: Sequence[dict[str, Any]],
    patches: Sequence[Patch],
    entrants: Sequence[Sequence[Entrant]],
) -> list[str]:
    pair = c.pairs[0]
    names = [c.names[pair.first], c.names[pair.second]]
    parts = [
        "<h2 id='worst'>Worst disagreements</h2>",
        f"<p>The {len(worst)} objects with a S/N above {SNR_LIMIT:g} where the images by "
        f"{_escape(names[0])} and {_escape(names[1])} differ most, of which at most half are in one "
        f"list only. Cut-outs are {2 * HALF + 1} pixels wide, y upwards; residuals are of all bands in "
        "standard deviations, blue (-5) to red (+5). Marks: "
        + ", ".join(
            f"<b style='color:{COLOURS[k % len(COLOURS)]}'>{_shape_name(k)}</b> {_escape(name)}"
            for k, name in enumerate(c.names)
        )
        + (", white dots: true objects" if c.true is not None else "")
        + "; bar: 2 arcsec.</p>",
    ]
    cutouts = Cutouts(patches, entrants)
    for number, entry in enumerate(worst):
        panels = cutouts.panels(entry["patch"], entry["x"], entry["y"], entry["rows"], entry["truth_row"])
        scale = patches[entry["patch"]].scene.pixel_scale
        marks = _marks(cutouts.marks(entry["patch"], entry["x"], entry["y"]), scale)
        figures = []
        for k, (title, png) in enumerate(panels):
            over = marks if k == 1 else ""
            figures.append(
                f"<figure><div class='cut'>{_picture(png, title)}{over}</div>"
                f"<figcaption>{_escape(title)}</figcaption></figure>"
            )
        parts.append(
            f"<article id='{_anchor(number)}'><h3>{number + 1}. {_escape(_name(c, entry))}</h3>"
            f"<p>{_describe(c, entry)}</p><div class='cuts'>{''.join(figures)}</div></article>"
        )
    if not worst:
        parts.append("<p>There is none.</p>")
    return parts


def _describe(c: Comparison, entry: dict[str, Any]) -> str:
    """A line about one object."""
    facts = [f"{entry['status']}, disagreement {_number(entry['disagreement'], 2)}"]
    t = _truth_index(c, entry)
    if t >= 0 and c.true is not None:
        facts.append(
            f"truth: {c.band} = {c.true['mag'][t]:.2f}, S/N {c.true['snr'][t]:.0f}, blendedness "
            f"{c.true['blendedness'][t]:.2f}"
        )
    else:
        facts.append(f"{c.band} = {_number(entry['mag'], 2)}, S/N {entry['snr']:.0f}")
    for k, name in enumerate(c.names):
        text = ""
        if entry["rows"][k] >= 0 and t >= 0 and np.isfinite(c.errors[k]["flux"][t]):
            percent = round(100 * float(c.errors[k]["flux"][t]))  # as an integer: no -0
            text = f"flux {percent:+d}\u00a0%"
        elif entry["rows"][k] >= 0:
            mag = _pick(c.objects[k], np.array([entry["patch"]]), np.array([entry["rows"][k]]), "mag")[0]
            text = f"{c.band} = {mag:.2f}"
        if text:
            facts.append(f"{name}: {text}")
    return _escape("; ".join(facts) + ".")


def _shape_name(k: int) -> str:
    return "+×○"[k % 3]


def _marks(marks: Sequence[tuple[int, NDArray]], pixel_scale: float) -> str:
    """Marks of objects and a scale bar over a cut-out."""
    side = 2 * HALF + 1
    drawn = []
    for k, places in marks:
        tone = _TRUTH_COLOUR if k < 0 else COLOURS[k % len(COLOURS)]
        for x, y in places.tolist():
            if k < 0:
                drawn.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='.7' fill='{tone}'/>")
            elif k % 3 == 2:
                drawn.append(
                    f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.4' fill='none' stroke='{tone}' "
                    "stroke-width='.8'/>"
                )
            else:
                a, b = ((2, 0), (0, 2)) if k % 3 == 0 else ((1.6, 1.6), (1.6, -1.6))
                for dx, dy in (a, b):
                    drawn.append(
                        f"<path d='M{x - dx:.1f} {y - dy:.1f}L{x + dx:.1f} {y + dy:.1f}' stroke='{tone}' "
                        "stroke-width='.8'/>"
                    )
    length = 2.0 / pixel_scale
    drawn.append(f"<path d='M3 {side - 3}h{length:.2f}' stroke='#fff' stroke-width='.8'/>")
    return f"<svg viewBox='0 0 {side} {side}' role='img' aria-label='marks'>{''.join(drawn)}</svg>"


def _objects(c: Comparison, entries: Sequence[dict[str, Any]]) -> list[str]:
    """The table of objects, linked with their pictures."""
    pair = c.pairs[0]
    a, b = c.names[pair.first], c.names[pair.second]
    band = c.bands.index(c.band)
    header = ["object", "status", "disagreement", f"S/N {a}", f"{c.band} {a}", f"{c.band} {b}"]
    header += [f"flux {b}/{a}", f"aperture {b}/{a}", f"{c.colour} {b}-{a}", "overlap"]
    header += ["shift [pixel]", f"blendedness {a}", f"blendedness {b}", f"chi2 {a}", f"chi2 {b}"]
    if c.true is not None:
        header += [f"true {c.band}", "true S/N", "true blendedness"]
        header += [f"flux error {name}" for name in c.names]
    rows = []
    for number, entry in enumerate(entries[:MAX_ROWS]):
        name = _escape(_name(c, entry))
        link = f"<a href='#{_anchor(number)}'>{name}</a>" if number < N_WORST else name
        cells = _cell(link) + _cell(entry["status"])
        values = [entry["disagreement"]]
        measured = []
        for k, row in zip((pair.first, pair.second), entry["pair_rows"], strict=True):
            at = int(np.searchsorted(c.objects[k]["patch"], entry["patch"])) + row
            columns = c.objects[k]
            keys = ("snr", "mag", "deblend_blendedness", "chi2")
            measured.append({key: float(columns[key][at]) if row >= 0 else math.nan for key in keys})
        values += [measured[0]["snr"], measured[0]["mag"], measured[1]["mag"]]
        n = entry["pair"]
        p = pair.columns
        if n >= 0:
            values += [p["flux"][n, band] + 1, p["redistributed"][n, band] + 1]
            values += [p["colour"][n], p["overlap"][n], p["shift"][n]]
        else:
            values += [math.nan] * 5
        values += [m["deblend_blendedness"] for m in measured] + [m["chi2"] for m in measured]
        if c.true is not None:
            t = _truth_index(c, entry)
            values += [c.true[key][t] if t >= 0 else math.nan for key in ("mag", "snr", "blendedness")]
            values += [error["flux"][t] if t >= 0 else math.nan for error in c.errors]
        cells += "".join(_cell(_number(float(v), 2), float(v)) for v in values)
        rows.append(cells)
    parts = [
        "<h2 id='objects'>Objects</h2>",
        f"<p>{len(rows)} of {len(entries)} objects of {_escape(a)} and {_escape(b)}, those in dispute first; "
        "a click on a heading sorts, and the first column leads to the pictures. Positions count from the "
        "patch's first pixel; identifiers are the first deblender's that has the object. Ratios are of "
        f"fluxes in {_escape(c.band)}, flux errors are measured / true - 1.</p>",
    ]
    parts.append(_table(header, rows, sortable=True, tall=True) if rows else "<p>There is none.</p>")
    return parts


def _method(c: Comparison) -> list[str]:
    lines = [
        f"S/N is that of an optimal filter, the root of the sum of squared image over variance, in {c.band}.",
        "Blendedness is 1 - sum(I_i^2) / sum(I_tot I_i).",
        f"Apertures are circles of {APERTURE:g} pixels in radius around the object's centre (the true one, "
        "or the first deblender's); the chi-square is the mean of squared residual over variance there, over "
        "all bands, and none is given where an object's image is made of the coadd's own pixels (sep, "
        "isolated sources of scarlet): there is no residual then. Such images have the coadd's noise, "
        "which lowers their cosine and disturbs their shapes.",
        "The redistributed image of an object is the coadd, each pixel shared out as the positive parts of "
        "the models are.",
        "Disagreement is the root of the summed squared difference of two images, over that of the brighter "
        "one, bands weighted by their noise: 0 for equal ones, 1 for an object that one of the two lacks.",
        "NMAD is 1.4826 times the median absolute deviation from the median. Bootstrap samples are drawn "
        "from objects, which counts the members of one blend as independent.",
        "Numbers of one deblender are of the objects that it found; who is better is decided on objects that "
        f"both found, with the same bootstrap samples, and not at all on fewer than {MIN_COUNT}.",
    ]
    if c.true is not None:
        lines.append(
            "Errors of fluxes are relative, of sums over the true objects' stamps; in means they count as no "
            "more than 5. Ellipticities are KSB's, corrected for the PSF; m is the slope of their error."
        )
    return ["<h2 id='method'>Definitions</h2><ul>", *(f"<li>{_escape(t)}</li>" for t in lines), "</ul>"]

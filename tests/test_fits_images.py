# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Anybody's files: what is read, what is refused and with which remedy, and what comes out."""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from click.testing import CliRunner
from lsst.meas.vaedeblend.adapters.fits_images import Images, _files, read_images
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.images import deblend_images
from lsst.meas.vaedeblend.plots import plot_blend
from synthetic import make_scene

BANDS = ("g", "r", "i")
X = np.array([30.0, 37.0, 90.3, 60.0])
Y = np.array([40.0, 42.0, 100.6, 64.0])
FLUX = np.array([[300, 500, 700], [600, 400, 200], [900, 900, 900], [250, 500, 500]], float)
ZERO_POINT = 27.0
PER_NJY = 10 ** (-0.4 * (31.4 - ZERO_POINT))
"""Units of the files per nJy."""
README = Path(__file__).resolve().parents[1] / "README.md"


@functools.cache
def simulated():
    return make_scene(X, Y, FLUX, 1.0, psf_sigma=(1.6, 1.4, 1.5), bands=BANDS)[0]


def header(shift=0.0, scale=0.2, calibrated=True) -> fits.Header:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.0]
    wcs.wcs.crpix = [64.0 + shift, 64.0]
    wcs.wcs.cdelt = [-scale / 3600, scale / 3600]
    out = wcs.to_header()
    if calibrated:
        out["MAGZERO"] = ZERO_POINT
    return out


class Files:
    """Files of the simulated scene, to be spoilt one by one."""

    def __init__(self, directory: Path, bands=BANDS) -> None:
        self.directory = directory
        scene = simulated()
        for b, band in enumerate(bands):
            self.write(f"{band}.fits", scene.image[b] * PER_NJY, header())
            self.write(f"{band}_var.fits", scene.variance[b] * PER_NJY**2)
            self.write(f"{band}_psf.fits", scene.psf.stamps[0, b])
        self.bands = tuple(bands)

    def write(self, name: str, array, head=None) -> None:
        fits.writeto(self.directory / name, np.asarray(array, np.float32), head, overwrite=True)

    def paths(self, suffix: str = "") -> dict[str, str]:
        return {band: str(self.directory / f"{band}{suffix}.fits") for band in self.bands}

    def read(self, **changes) -> Images:
        given = {"image": self.paths(), "variance": self.paths("_var"), "psf": self.paths("_psf")}
        return read_images(**(given | changes))

    def options(self, **changes) -> list[str]:
        given = {"image": self.paths(), "variance": self.paths("_var"), "psf": self.paths("_psf")} | changes
        return [
            part
            for kind, paths in given.items()
            for b, path in paths.items()
            for part in (f"--{kind}", f"{b}={path}")
        ]


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


def test_files_become_a_calibrated_scene(files):
    images, truth = files.read(), simulated()
    assert images.bands == BANDS and images.pixel_scale == pytest.approx(0.2, rel=1e-6)
    np.testing.assert_allclose(images.image, truth.image, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(images.variance, truth.variance, rtol=1e-5)
    np.testing.assert_allclose(images.psf, truth.psf.stamps[0], atol=1e-8)
    assert images.nanojansky["g"] == pytest.approx(1 / PER_NJY, rel=1e-3)
    assert all(abs(images.sky[band]) < 0.05 for band in BANDS)
    scene = images.scene()
    owner = np.full(scene.shape, -1)
    for parent in scene.parents:
        window, inside = parent.window(scene.shape)
        owner[window][inside] = parent.id
    found = owner[np.rint(Y).astype(int), np.rint(X).astype(int)]
    assert (found > 0).all() and found[0] == found[1] != found[2]
    # The middle of the header's frame, counted from 0.
    ra, dec = images.coordinates(np.array([63.0]), np.array([63.0]))
    assert ra[0] == pytest.approx(150.0) and dec[0] == pytest.approx(2.0)


def test_cubes_extensions_weights_and_npz_give_the_same(files, tmp_path):
    one, scene = files.read(), simulated()
    image, variance = scene.image * PER_NJY, scene.variance * PER_NJY**2
    cube = fits.HDUList(
        [fits.PrimaryHDU(), fits.ImageHDU(image, header(), "SCI"), fits.ImageHDU(1 / variance, name="WHT")]
    )
    cube.append(fits.ImageHDU(scene.psf.stamps[0], name="PSF"))
    path = str(tmp_path / "cube.fits")
    cube.writeto(path)
    names = {"weight": f"{path}[WHT]", "psf": f"{path}[3]", "bands": BANDS}
    np.savez(
        tmp_path / "all.npz",
        images=image,
        weights=1 / variance,
        psfs=scene.psf.stamps[0],
        bands=BANDS,
        peaks=np.column_stack([X, Y]),
    )
    stored = read_images(tmp_path / "all.npz", zeropoint=ZERO_POINT, pixel_scale=0.2)
    for other in (read_images(path, **names), stored):
        np.testing.assert_allclose(other.image, one.image, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other.variance, one.variance, rtol=1e-5)
        np.testing.assert_allclose(other.psf, one.psf, atol=1e-7)
    np.testing.assert_array_equal(stored.peaks, np.column_stack([X, Y]))
    assert sum(len(parent.peaks) for parent in stored.scene().parents) == len(X)
    with pytest.raises(ValueError, match=r"cube.fits holds several bands: say which, in order \(--bands"):
        read_images(path, weight=f"{path}[WHT]", psf=f"{path}[3]")
    with pytest.raises(ValueError, match=r"the image has shape \(3, 128, 128\); the 2 bands g r need \(2, "):
        read_images(path, **(names | {"bands": "gr"}))


def test_masks(files, tmp_path):
    mask = np.zeros((128, 128))
    mask[:, :64] = 4
    mask[:, 64:] = 2
    files.write("mask.fits", mask)
    fits.writeto(tmp_path / "bits.fits", mask.astype(np.int16))
    with pytest.raises(ValueError, match=r"mask.fits \(band g\): the mask leaves no pixel.*--bad-bits"):
        files.read(mask=tmp_path / "mask.fits")
    valid = files.read(mask=tmp_path / "bits.fits", bad_bits=4).valid
    assert not valid[:, :, :64].any() and valid[:, :, 64:].all()
    with pytest.raises(ValueError, match="bad bits need a mask of integers"):
        files.read(mask=tmp_path / "mask.fits", bad_bits=4)


@pytest.mark.parametrize(
    ("power", "option", "remedy"),
    [
        (-1.0, "variance", "looks like a weight map .inverse variance.: give it as --weight r=FILE"),
        (1.0, "weight", "looks like a variance: give it as --variance r=FILE"),
        (0.5, "variance", "looks like a standard deviation .rms.: square it"),
        (-0.5, "weight", "looks like an inverse standard deviation: square it"),
    ],
)
def test_a_map_that_is_another(files, power, option, remedy, caplog):
    wrong = np.full((128, 128), PER_NJY ** (2 * power))
    files.write("r_map.fits", wrong)
    r = files.directory / "r_map.fits"
    others = {band: path for band, path in files.paths("_var").items() if band != "r"}
    given = (
        {"variance": others | {"r": r}} if option == "variance" else {"variance": others, "weight": {"r": r}}
    )
    with pytest.raises(
        ValueError, match=rf"r_map.fits \(band r\): the median variance is .*{remedy}"
    ) as error:
        files.read(**given)
    assert str(error.value).count("(band") == 1, "bands that are right are not complained about"
    with caplog.at_level(logging.WARNING):
        files.read(**given, check=False)
    assert re.search(remedy, caplog.text)


def test_a_relative_weight(files):
    files.write("r_var.fits", np.full((128, 128), 500 * PER_NJY**2))
    with pytest.raises(
        ValueError, match=r"r_var.fits \(band r\).*relative weight.* 0.00[12]\d* times as large"
    ):
        files.read()


def test_correlated_noise_passes():
    """Resampled coadds have smoother noise than their variances say."""
    from lsst.meas.vaedeblend.adapters.fits_images._checks import _scatter
    from scipy import ndimage

    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(200, 200)), 0.5)
    low, high = _scatter(noise, np.ones(noise.shape, bool))
    assert low**2 < noise.var() < 1.1 * high**2 and low**2 > 0.3 * noise.var()


def test_sky_left_in(files, caplog):
    files.write("i.fits", simulated().image[2] * PER_NJY + 3 * PER_NJY, header())
    with pytest.raises(ValueError, match=r"i.fits \(band i\): .* \+3.0 standard deviations: sky was left in"):
        files.read()
    files.write("i.fits", simulated().image[2] * PER_NJY + 0.5 * PER_NJY, header())
    with caplog.at_level(logging.WARNING):
        files.read()
    assert "i.fits (band i): the source-free pixels have a median of +0." in caplog.text


def test_units(files):
    pixels = simulated().image[1] * PER_NJY
    files.write("r.fits", pixels, header(calibrated=False))
    with pytest.raises(ValueError, match=r"r.fits \(band r\) is uncalibrated.*--zeropoint r=MAG"):
        files.read()
    assert files.read(zeropoint={"r": ZERO_POINT}).nanojansky["r"] == pytest.approx(1 / PER_NJY, rel=1e-3)
    bare = header(calibrated=False)
    for key, value, expected in (
        ("BUNIT", "uJy", 1000.0),
        ("FLUXMAG0", 10 ** (0.4 * ZERO_POINT), 1 / PER_NJY),
        ("PHOTZP", ZERO_POINT, 1 / PER_NJY),
        # One pixel of 0.2 arcsec covers 9.4e-13 sr.
        ("BUNIT", "MJy/sr", 0.2**2 / 206264.806**2 * 1e15),
    ):
        head = bare.copy()
        head[key] = value
        files.write("r.fits", pixels, head)
        assert files.read().nanojansky["r"] == pytest.approx(expected, rel=1e-3)
    # Units in which variances are smaller than single precision holds.
    head = bare.copy()
    head["BUNIT"] = "erg / (s cm2 Hz)"
    files.write("r.fits", simulated().image[1] * 1e-32, head)
    fits.writeto(files.directory / "tiny.fits", np.full((128, 128), 1e-64))
    tiny = files.read(variance=files.paths("_var") | {"r": files.directory / "tiny.fits"})
    np.testing.assert_allclose(tiny.variance[1], 1.0, rtol=1e-5)
    head = bare.copy()
    head["BUNIT"] = "MJy/sr"
    head["MAGZERO"] = ZERO_POINT
    files.write("r.fits", pixels, head)
    with pytest.raises(
        ValueError, match=r"r.fits \(band r\): the header contradicts itself .*--zeropoint r=MAG"
    ):
        files.read()
    head = header()
    head["MAGSYS"] = "Vega"
    files.write("r.fits", pixels, head)
    with pytest.raises(ValueError, match=r"r.fits \(band r\): the header's zero point is in Vega magnitudes"):
        files.read()


def test_grids(files):
    pixels = simulated().image[1] * PER_NJY
    files.write("r.fits", pixels, header(shift=2.5))
    with pytest.raises(
        ValueError, match=r"r.fits \(band r\) lies \+2.50, .* off .*g.fits \(band g\).*one grid"
    ):
        files.read()
    files.write("r.fits", pixels[:100], header())
    with pytest.raises(
        ValueError, match=r"r.fits \(band r\): the image has shape \(100, 128\), .*g.fits.*one grid"
    ):
        files.read()
    files.write("r.fits", pixels, header())
    files.write("i_var.fits", np.ones((64, 64)))
    with pytest.raises(ValueError, match=r"i_var.fits \(band i\): the variance has shape \(64, 64\)"):
        files.read()


def test_pixel_scales(files, tmp_path):
    for band, pixels in zip(BANDS, simulated().image * PER_NJY, strict=True):
        files.write(f"{band}.fits", pixels, header(scale=720.0))
    with pytest.raises(
        ValueError, match=r"g.fits: pixels 720 arcsec wide are absurd .*--pixel-scale and --wcs"
    ):
        files.read()
    header().totextfile(tmp_path / "wcs.head")
    assert files.read(wcs=tmp_path / "wcs.head").pixel_scale == pytest.approx(0.2, rel=1e-6)
    for band, pixels in zip(BANDS, simulated().image * PER_NJY, strict=True):
        files.write(f"{band}.fits", pixels)
    with pytest.raises(ValueError, match=r"g.fits has no WCS: give the width of a pixel"):
        files.read(zeropoint=ZERO_POINT)
    assert files.read(zeropoint=ZERO_POINT, pixel_scale=0.2).wcs is None


def test_psfs(files):
    psf = simulated().psf.stamps[0, 1]
    for wrong, complaint in (
        (
            np.pad(psf, ((1, 0), (1, 0))),
            r"the PSF kernel has 26 x 26 pixels; .*psf\[1:, 1:\] has it in the middle",
        ),
        (np.roll(psf, 3, axis=1), r"the PSF is centred \+3.0, [+-]0.0 pixels \(x, y\) from the middle"),
        (psf * 0, "the PSF should be finite with a positive sum"),
    ):
        files.write("r_psf.fits", wrong)
        with pytest.raises(ValueError, match=rf"r_psf.fits \(band r\): {complaint}"):
            files.read()
    # Other odd sizes are put on one.
    files.write("r_psf.fits", psf[5:-5, 5:-5])
    assert files.read().psf.shape == (3, 25, 25)


def test_what_is_missing_is_named_all_at_once(files):
    one = {"g": files.paths("_var")["g"]}
    with pytest.raises(ValueError) as error:
        files.read(variance=one, psf={band: files.paths("_psf")[band] for band in "gr"})
    message = str(error.value)
    assert (
        message.count("has no variance") == 2 and "i.fits (band i) has no PSF: give --psf i=FILE" in message
    )
    with pytest.raises(ValueError, match="variance of band z, which has no image"):
        files.read(variance=files.paths("_var") | {"z": one["g"]})
    with pytest.raises(ValueError, match="give a variance or a weight map, not both"):
        files.read(weight=one)


def test_files_that_are_none(files, tmp_path, monkeypatch):
    (tmp_path / "r.fits").write_text("no FITS\n" * 1000)
    with pytest.raises(ValueError, match=r"r.fits \(band r\) cannot be read as FITS"):
        files.read()
    with pytest.raises(FileNotFoundError, match="none.fits"):
        files.read(image=files.paths() | {"r": "none.fits"})
    with pytest.raises(ValueError, match="g.fits .band r. has no extension 'SCI'"):
        files.read(image=files.paths() | {"r": f"{files.paths()['g']}[SCI]"})
    np.savez(tmp_path / "pickled.npz", image=np.array([{"a": 1}], dtype=object), bands=BANDS)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_images(tmp_path / "pickled.npz")
    monkeypatch.setattr(_files, "MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"g.fits \(band g\): \(128, 128\) pixels are too many"):
        files.read()


def test_peaks(files, tmp_path):
    images = files.read()
    ra, dec = images.coordinates(X, Y)
    tables = (
        Table({"x": X, "y": Y, "parent": [1, 1, 2, 3]}),
        Table({"X_IMAGE": X + 1, "Y_IMAGE": Y + 1}),
        Table({"ra": ra, "dec": dec}),
    )
    for i, table in enumerate(tables):
        table.write(tmp_path / f"{i}.ecsv")
        read = files.read(peaks=tmp_path / f"{i}.ecsv")
        np.testing.assert_allclose(read.peaks, np.column_stack([X, Y]), atol=1e-4)
        assert sum(len(parent.peaks) for parent in read.scene().parents) == 4
    with pytest.raises(ValueError, match="3 of 4 peaks lie outside of the 128 x 128 pixels"):
        files.read(peaks=Table({"x": X + 95, "y": Y}))
    with pytest.raises(ValueError, match="The peak table has the columns a; peaks need x and y"):
        files.read(peaks=Table({"a": X}))


def test_the_command(files, network_path, tmp_path):
    out, arguments = tmp_path / "out", files.options()
    command = ["deblend", str(out), *arguments, "--network", str(network_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    objects = Table.read(out / "objects.fits")
    assert len(objects) == 4 and Table.read(out / "objects.parquet").colnames == objects.colnames
    index = [int(np.argmin(np.hypot(objects["x"] - x, objects["y"] - y))) for x, y in zip(X, Y, strict=True)]
    assert sorted(index) == [0, 1, 2, 3]
    flux = np.column_stack([objects[f"{band}_flux"] for band in BANDS])[index]
    np.testing.assert_allclose(flux, FLUX, rtol=0.15)
    assert str(objects["r_flux"].unit) == "nJy"
    ra, dec = files.read().coordinates(objects["x"], objects["y"])
    np.testing.assert_allclose(objects["coord_ra"], ra, atol=1e-9)
    # What is shared out, models and residual fit together.
    stamps = Table.read(out / "stamps.fits")
    assert stamps["deblended"].shape == (4, 3, 64, 64) and stamps.meta["BANDS"] == "g r i"
    np.testing.assert_allclose(stamps["deblended"][index].sum(axis=(2, 3)), FLUX, rtol=0.2)
    with fits.open(out / "models.fits") as models, fits.open(out / "residual.fits") as residual:
        for b, band in enumerate(BANDS):
            whole = models[band].data + residual[band].data
            np.testing.assert_allclose(whole, simulated().image[b], rtol=1e-3, atol=1e-3)
        assert WCS(residual["g"].header).wcs.crval[0] == 150.0 and residual["g"].header["BUNIT"] == "nJy"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_objects"] == 4 and summary["reduced_chi2"] < 1.5 < summary["reduced_chi2_before"]
    for name in summary["pictures"]:
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert len(summary["pictures"]) == 2
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "--overwrite replaces them" in again.output
    peaks = tmp_path / "peaks.csv"
    Table({"x": X[:3], "y": Y[:3]}).write(peaks)
    arguments = [*command, "--overwrite", "--peaks", str(peaks), "--no-stamps", "--blends", "0"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["given_peaks"] == 3 and summary["pictures"] == ["scene.png"]


def test_the_commands_errors(files, network_path, tmp_path):
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["deblend", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 1 and "Traceback" not in result.output
        return result.output

    network = ("--network", str(network_path))
    two = {
        kind: {b: p for b, p in files.paths(s).items() if b != "i"}
        for kind, s in (("image", ""), ("variance", "_var"), ("psf", "_psf"))
    }
    output = refused(*files.options(**two), *network)
    assert "No image in band i: network synthetic has g r i" in output and "allowMissingBands=True" in output
    renamed = {kind: {b.upper(): p for b, p in paths.items()} for kind, paths in two.items()}
    assert "g.fits: there is no band G, network synthetic has g r i" in refused(
        *files.options(**renamed), *network
    )
    output = refused(*files.options(), *network, "-c", "no_such=1")
    assert "There is no setting 'no_such'" in output
    assert "'x' is no value" in refused(*files.options(), *network, "-c", "refinementSteps=x")
    assert "--zeropoint takes numbers" in refused(*files.options(), *network, "--zeropoint", "r=bright")
    assert "--image is given once without a band" in refused(*files.options(), *network, "--image", "x.fits")
    for band, pixels in zip(BANDS, simulated().image * PER_NJY, strict=True):
        files.write(f"{band}.fits", pixels, header(scale=0.3))
    output = refused(*files.options(), *network)
    assert "g.fits: its pixels are 0.3 arcsec wide, those of network synthetic 0.2" in output
    assert not (tmp_path / "out").exists()


def test_a_missing_band_and_other_noise_can_be_let_pass(files, network_path, tmp_path, caplog):
    two = {band: path for band, path in files.paths().items() if band != "i"}
    images = files.read(
        image=two,
        variance={b: files.paths("_var")[b] for b in two},
        psf={b: files.paths("_psf")[b] for b in two},
        # Ten magnitudes off: noise ten thousand times too large.
        zeropoint=ZERO_POINT - 10,
    )
    from lsst.meas.vaedeblend import DeblendConfig

    config, steps = DeblendConfig(), []
    assert config.allowMissingBands
    with caplog.at_level(logging.WARNING):
        summary = deblend_images(
            images,
            tmp_path / "out",
            network=str(network_path),
            config=config,
            n_blends=1,
            progress=lambda part, what: steps.append((part, what)),
        )
    parts = [part for part, _ in steps]
    assert parts == sorted(parts) and parts[0] == 0.0 and parts[-1] == 1.0
    assert any(what.startswith("round 1: ") for _, what in steps)
    assert "Is the zero point right?" in caplog.text and "g.fits (band g)" in caplog.text
    assert summary["flags"]["missing_band"] == summary["n_objects"] == 4
    with fits.open(tmp_path / "out" / "residual.fits") as hdus:
        assert [hdu.header["BAND"] for hdu in hdus[1:]] == ["g", "r"]


def test_plots_of_what_is_not_there(files, network):
    from lsst.meas.vaedeblend import deblend

    scene = files.read(peaks=Table({"x": X, "y": Y})).scene()
    result = deblend(scene, network)
    with pytest.raises(ValueError, match="The scene has no parent 99"):
        plot_blend(scene, result, 99)
    figure = plot_blend(scene, result, int(result.sources.parent[0]))
    titles = [a.get_title() for a in figure.axes]
    assert any(t.startswith("object 1, r ") for t in titles) and any(
        "red i, green r, blue g" in t for t in titles
    )


def test_the_readme_runs(tmp_path, monkeypatch):
    """The example of the front page, word for word, on files as it names them."""
    section = README.read_text().split("## From FITS images")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    flux = np.array([[300, 400, 600, 800, 900, 900], [600, 600, 600, 700, 800, 900]], float)
    scene, _ = make_scene([30.0, 39.0], [32.0, 33.0], flux, shape=(64, 64), bands="ugrizy", noise=5.0)
    for b, band in enumerate("ugrizy"):
        fits.writeto(tmp_path / f"{band}.fits", scene.image[b] * PER_NJY, header())
        fits.writeto(tmp_path / f"{band}_var.fits", scene.variance[b] * PER_NJY**2)
        fits.writeto(tmp_path / f"{band}_psf.fits", scene.psf.stamps[0, b])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code[1], names)
    assert len(names["objects"]) == 2 and names["stamps"].shape == (2, 6, 64, 64)
    assert np.isfinite(names["objects"]["coord_ra"]).all()
    np.testing.assert_allclose(np.sort(names["objects"]["z_flux"]), [700, 800], rtol=0.3)
    assert (tmp_path / "blend.png").read_bytes()[:4] == b"\x89PNG"

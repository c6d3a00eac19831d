# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a training run to the ONNX artefact and its card."""

from __future__ import annotations

__all__ = ["export_network", "figures_of_merit", "fit_graphs", "write_card", "write_fit_graphs"]

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import subprocess
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..ground.bands import reference_band
from ..ground.psf import gaussian_psf
from ..ground.statistics import nmad
from ..ground.writing import whole_file
from ..network import Network, NetworkMetadata, embed_metadata, read_metadata
from ..simulation.blends import psf_stamp
from ..simulation.config import SceneConfig, TrainingConfig, training_length
from ..simulation.galaxies import MODEL_SIGMA
from ..simulation.ksb import ksb_shape
from ..simulation.scenes import Cutouts, squared_snr
from ..simulation.surveys import SurveyInfo
from .derivatives import MixtureTangents
from .fit import SceneData, VaeModule
from .fitting import Linearise, Render
from .history import run_history
from .networks import Deblender, Decoder, build_networks
from .weights import halve_weights, load_weights, round_weights

_LOG = logging.getLogger("lsst.meas.vaedeblend.training")

MAX_RELATIVE_DIFFERENCE = 1e-4
"""Largest difference of ONNX and torch on test cutouts, relative to an output's largest value.

Cards tell what was found.
"""


_COMMON = {"kernels", "x", "y", "columns", "rows", "back_rows", "back_columns"}
"""Inputs of the graphs for fitting that all sources share."""


def _config_text(config: TrainingConfig) -> str:
    buffer = io.StringIO()
    config.saveToStream(buffer)
    # The first lines name the class and its import; they are kept so that the text loads again.
    return buffer.getvalue()


def _git_commit() -> str:
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return out.stdout.strip() if out.returncode == 0 else "unknown"


def _to_onnx(module: torch.nn.Module, example: tuple, inputs: list[str], outputs: list[str]) -> bytes:
    """Serialize a module with a free batch size, and whatever else is free in the graphs that latents are
    fitted with: numbers of pixels, cells and frequencies."""
    shapes: tuple
    if isinstance(module, Render | Linearise):
        free = torch.export.Dim.AUTO
        fixed = {"latent": {0: free}}
        pairs = zip(inputs, example, strict=True)
        shapes = tuple(fixed.get(name, dict.fromkeys(range(a.ndim), free)) for name, a in pairs)
    else:
        batch = torch.export.Dim("N", min=1, max=65536)
        shapes = tuple({0: batch} for _ in inputs)
    # A deblender takes its inputs as one variable argument.
    if isinstance(module, Deblender):
        shapes = (shapes,)
    # torch announces its own plans in warnings and prints; the user of an export has no use for them.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            example,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            # Simplified graphs have lost part of the weights' names, by which `load_weights` knows them.
            optimize=False,
            external_data=False,
            verbose=False,
        )
    return _without_traces(program.model_proto).SerializeToString()


def fit_graphs(decoder: Decoder) -> dict[str, bytes]:
    """Serialize the graphs that latents are fitted with.

    Parameters
    ----------
    decoder : `lsst.meas.vaedeblend.training.networks.Decoder`
        A decoder that draws Gaussians.

    Returns
    -------
    graphs : `dict` [`str`, `bytes`]
        By kind, without metadata.
    """
    example = _fit_example(decoder, torch.randn(3, decoder.skip.in_features))
    graphs = {}
    for kind, module in _fit_modules(decoder).items():
        arguments = tuple(example[name] for name in module.inputs)
        with torch.no_grad():
            graphs[kind] = _to_onnx(module.eval(), arguments, list(module.inputs), list(module.outputs))
    return graphs


def _fit_modules(decoder: Decoder) -> dict[str, Render | Linearise]:
    return {"render": Render(decoder), "linearise": Linearise(MixtureTangents(decoder))}


def _fit_example(decoder: Decoder, latent: Tensor) -> dict[str, Tensor]:
    """Inputs of both graphs by name, for some latents (N, L): random images and kernels of two cells."""
    n, b, width, size, coarse = len(latent), decoder.bands, 12, 20, 6
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    k = size // 2 + 1
    line = torch.arange(float(width)) - width // 2
    middles = (2.0 * torch.arange(float(coarse)) - width // 2 + 0.5).expand(n, -1).contiguous()
    return {
        "latent": latent,
        "kernels": random(2, 2, b, size, k),
        "cell": torch.arange(n) % 2,
        "x": line,
        "y": line,
        "columns": random(width, 2 * k),
        "rows": random(2 * size, 2 * width),
        "back_rows": random(2 * width, 2 * size),
        "back_columns": random(2 * k, width),
        "weighted": random(n, b, width, width),
        "weight": random(n, b, coarse, coarse),
        "psf_moments": torch.tensor([2.0, 2.5, 0.1]).expand(n, b, 3).contiguous(),
        "u": middles,
        "v": middles.clone(),
    }


def write_fit_graphs(network: str | os.PathLike, config: TrainingConfig, out: str | os.PathLike) -> None:
    """Write anew the graphs that the latents of a network are fitted with, from the weights in its file.

    Parameters
    ----------
    network : `str` or path-like
        Name of a network that ships, or the path of its file.
    config : `TrainingConfig`
        The configuration that it was made with.
    out : path
        Directory of the files NAME_render.onnx and NAME_linearise.onnx.

    Raises
    ------
    NetworkError
        If there is no such network.
    """
    metadata = read_metadata(network)
    _, decoder = build_networks(len(config.bands), config.scene.cutout_size, config.network)
    weights = {
        k.removeprefix("decoder."): v for k, v in load_weights(network).items() if k.startswith("decoder.")
    }
    decoder.load_state_dict({k: weights[k] for k in decoder.state_dict()})
    for kind, graph in fit_graphs(decoder.eval()).items():
        own = dataclasses.replace(metadata, kind=kind)
        with whole_file(Path(out) / f"{metadata.name}_{kind}.onnx") as part:
            part.write_bytes(embed_metadata(graph, own))


def _without_traces(model):
    """Drop what torch notes of how a graph came about: stack traces, with paths of the exporting machine."""
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        for item in (graph, *graph.node, *graph.value_info):
            del item.metadata_props[:]
            item.doc_string = ""
        if hasattr(graph, "initializer"):
            for item in (*graph.initializer, *graph.input, *graph.output):
                del item.metadata_props[:]
                item.doc_string = ""
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    del model.metadata_props[:]
    model.doc_string = ""
    return model


def _check_agreement(
    path: Path, module: torch.nn.Module, decoder: torch.nn.Module, cutouts: Cutouts
) -> float:
    """Largest relative difference between artefact and torch on six cutouts, at two batch sizes."""
    network = Network.load(path)
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for rows in (slice(0, 1), slice(1, 6)):
        arrays = (cutouts.image, cutouts.valid, cutouts.noise, cutouts.psf_moments)
        image, valid, noise, moments = (torch.from_numpy(a[rows]).float() for a in arrays)
        n = len(image)
        epsilon = torch.randn(n, network.metadata.latent_size, generator=generator)
        known = {"image": image, "valid": valid, "noise": noise, "psf_moments": moments, "epsilon": epsilon}
        with torch.no_grad():
            expected = module(*(known[name] for name in module.inputs))
            drawn = decoder(expected[1])
        found = network.deblend(*(t.numpy() for t in (image, valid, noise, moments, epsilon)))
        pairs = [
            (expected[0], found.model),
            (expected[1], found.latent_mean),
            (expected[2], found.latent_sigma),
            (drawn, network.decoder.render(expected[1].numpy())),
        ]
        if isinstance(decoder, Decoder):
            example = _fit_example(decoder, expected[1])
            inputs = {name: tensor.numpy() for name, tensor in example.items()}
            artefacts = {"render": network.render, "linearise": network.linearise}
            for kind, part in _fit_modules(decoder).items():
                with torch.no_grad():
                    drawn = part(*(example[name] for name in part.inputs))
                own = {k: a for k, a in inputs.items() if len(a) == n and k not in _COMMON}
                common = {k: a for k, a in inputs.items() if k in _COMMON}
                pairs += zip(drawn, artefacts[kind].run(part.outputs, own, common, n), strict=True)
        for a, c in pairs:
            a, c = a.numpy().reshape(n, -1), np.asarray(c).reshape(n, -1)
            worst = max(worst, float((np.abs(a - c).max(axis=1) / np.abs(a).max(axis=1)).max()))
    return worst


def figures_of_merit(
    network: Network, scenes: SceneData, config: TrainingConfig, samples: int = 2048, isolated: bool = False
) -> dict[str, float]:
    """Measure one pass of a network on blends of galaxies that it has not seen.

    Parameters
    ----------
    network : `lsst.meas.vaedeblend.network.Network`
    scenes : `SceneData`
        Gives the scenes of the test sample.
    config : `TrainingConfig`
    samples : `int`
        Number of blends.
    isolated : `bool`
        Measure on isolated galaxies instead.

    Returns
    -------
    figures : `dict` [`str`, `float`]
        For sources with matched-filter S/N above 10 in the reference band
        (`lsst.meas.vaedeblend.ground.bands.reference_band`), centred at the true pixel, without later
        iterations or flux solve: ``flux_meanabs`` and ``flux_nmad`` of F / F_true - 1 with errors cut at 5;
        ``cosine_mean``, the mean cosine similarity in the models' frame; ``ellipticity_nmad`` and
        ``shear_response_m``, scatter and slope of the error of the KSB ellipticity against the true one,
        galsim.hsm with that frame's PSF.
    """
    composer = scenes.composer("test", isolated)(np.random.default_rng(5))
    batch: Cutouts = next(composer.batches(samples))
    output = network.deblend(batch.image, batch.valid.astype(np.float32), batch.noise, batch.psf_moments)
    ref = config.bands.index(reference_band(config.bands))
    truth, model = batch.target[:, ref].astype(float), output.model[:, ref].astype(float)
    total = truth.sum((1, 2))
    area = total**2 / np.maximum((truth**2).sum((1, 2)), 1e-30)
    good = squared_snr(total, batch.noise[:, ref], area, batch.psf_moments[:, ref]) > 10**2
    truth, model = truth[good], model[good]
    flux = model.sum((1, 2)) / truth.sum((1, 2)) - 1
    cosine = (truth * model).sum((1, 2)) / np.sqrt((truth**2).sum((1, 2)) * (model**2).sum((1, 2)))
    psf = gaussian_psf(MODEL_SIGMA, 25)
    if config.composition == "blends":
        psf = psf_stamp(config.blend, scenes.survey.bands[ref])
    e_true = np.array([ksb_shape(t, psf) for t in truth])
    error = np.array([ksb_shape(t, psf) for t in model]) - e_true
    sound = np.isfinite(error + e_true).all(axis=1) & (np.hypot(*e_true.T) < 0.9) & (np.hypot(*error.T) < 1)
    e_true, error = e_true[sound].ravel(), error[sound].ravel()
    return {
        "samples": int(good.sum()),
        "reference_band": config.bands[ref],
        "flux_meanabs": float(np.mean(np.minimum(np.abs(flux), 5))),
        "flux_nmad": nmad(flux),
        "cosine_mean": float(cosine.mean()),
        "ellipticity_nmad": nmad(error),
        "shear_response_m": float(np.polyfit(e_true, error, 1)[0]),
    }


def export_network(
    config: TrainingConfig,
    data: str | os.PathLike,
    run: str | os.PathLike,
    out: str | os.PathLike,
    command: str,
    step: str = "deblender",
    samples: int = 2048,
) -> Path:
    """Write NAME.onnx, NAME_decoder.onnx and the card NAME.md.

    For sums of Gaussians also NAME_render.onnx and NAME_linearise.onnx.

    Parameters
    ----------
    config : `TrainingConfig`
        The configuration that the run was made with.
    data : path
        The banks; the test bank measures the figures of merit.
    run : path
        The training run.
    out : path
        Directory of the files.
    command : `str`
        How the network was made, for the card.
    step : `str`
        The step whose checkpoint is exported; the prior's files are named NAME_prior.
    samples : `int`
        Number of blends on which the figures of merit are measured.

    Returns
    -------
    path : `pathlib.Path`
        The deblender's file.

    Raises
    ------
    RuntimeError
        If the exported graphs do not agree with torch.
    ValueError
        If banks or checkpoints were made with another configuration.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = Path(run) / step / "final.ckpt"
    scenes = SceneData(config, data, step, workers=0)
    module = VaeModule(config, step, scenes.kernel_power())
    history = run_history(run, config, step)
    module.load_state_dict(load_weights(checkpoint))
    deblender = Deblender(module.encoder, module.decoder).eval().float()
    # channels_last is for training; the graph is written in the plain layout.
    deblender = deblender.to(memory_format=torch.contiguous_format)
    if module.convolutional:
        # Trained in bfloat16, with fewer digits still. The sums of Gaussians are small enough as they are.
        round_weights(deblender)
    survey, size = scenes.survey, config.scene.cutout_size
    b, length = len(config.bands), config.network.latent_size
    text = _config_text(config)
    name = config.name if step == "deblender" else f"{config.name}_{step}"
    training_range, frame, centre = _conditions(config, survey)
    metadata = NetworkMetadata(
        name=name,
        kind="deblender",
        bands=tuple(config.bands),
        pixel_scale=survey.pixel_scale,
        cutout_size=size,
        latent_size=length,
        frame=frame,
        centre=(centre, centre),
        training_range=training_range,
        training={
            "config": text,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "git_commit": _git_commit(),
            **_training(history, step),
            "description": _describe(config),
            "command": command,
        },
        figures_of_merit={},
        licence="GPL-3.0-or-later",
    )
    examples = {
        "image": torch.randn(3, b, size, size),
        "valid": torch.ones(3, b, size, size),
        "noise": torch.ones(3, b),
        "psf_moments": torch.tensor([2.0, 2.0, 0.0]).expand(3, b, 3).contiguous(),
        "epsilon": torch.zeros(3, length),
    }
    with torch.no_grad():
        graph = _to_onnx(
            deblender,
            tuple(examples[i] for i in deblender.inputs),
            list(deblender.inputs),
            ["model", "latent_mean", "latent_sigma"],
        )
        decoder_graph = _to_onnx(deblender.decoder, (torch.randn(3, length),), ["latent"], ["model"])
        graphs = {"deblender": graph, "decoder": decoder_graph}
        if module.convolutional:
            graphs = {kind: halve_weights(graph) for kind, graph in graphs.items()}
        else:
            graphs |= fit_graphs(deblender.decoder)
    path = out / f"{name}.onnx"

    def write(merit: dict) -> NetworkMetadata:
        own = dataclasses.replace(metadata, figures_of_merit=merit)
        for kind, graph in graphs.items():
            file = path if kind == "deblender" else out / f"{name}_{kind}.onnx"
            with whole_file(file) as part:
                part.write_bytes(embed_metadata(graph, dataclasses.replace(own, kind=kind)))
        return own

    write({})
    cutouts = next(scenes.composer("test", step == "prior")(np.random.default_rng(4)).batches(6))
    difference = _check_agreement(path, deblender, deblender.decoder, cutouts)
    if difference > MAX_RELATIVE_DIFFERENCE:
        raise RuntimeError(f"The exported graph differs from torch by {difference:.2g}, relative.")
    merit = figures_of_merit(Network.load(path), scenes, config, samples, isolated=step == "prior")
    merit["onnx_torch_difference"] = difference
    merit["command"] = command
    write_card(write(merit), out / f"{name}.md")
    return path


def _training(history: dict[str, dict], step: str) -> dict[str, dict]:
    """Samples, hours and first weights of each step, by step, as the checkpoints tell.

    A prior that is not there was that of the first weights, whose decoder the deblender keeps.
    """
    before = history[step]["initial_samples"]
    samples = {name: before[name] for name in ("prior",) if name in before and name not in history}
    base = {}
    for name, own in history.items():
        samples[name] = own["samples"]
        seen = own["initial_samples"].get(name)
        base[name] = own["initial"] + (f" ({seen} samples)" if seen else "")
    hours = {name: round(own["hours"], 3) for name, own in history.items()}
    return {"samples": samples, "base": base, "hours": hours}


def _conditions(config: TrainingConfig, survey: SurveyInfo) -> tuple[dict, dict, float]:
    """Training range and frame of the metadata, and the pixel index of the cutout's centre on both axes."""
    size, bands = config.scene.cutout_size, survey.bands
    if config.composition == "blends":
        fwhm = {b.name: config.blend.psf_fwhm[b.name] for b in bands}
        frame = {"type": "observed", "fwhm": fwhm, "pixel_scale": {b.name: b.pixel_scale for b in bands}}
        # One depth and one PSF: a tenth either way is as far as a network may be taken from them.
        noise = {b.name: [0.9 * b.noise, 1.1 * b.noise] for b in bands}
        seeing = [0.9 * min(fwhm.values()), 1.1 * max(fwhm.values())]
        return {"noise": noise, "psf_fwhm": seeing}, frame, (size - 1) / 2
    # Two standard deviations of the scatter between bands belong to the range that was seen often.
    scatter = np.exp(2 * config.scene.noise_band_scatter)
    low, high = config.scene.noise_range
    noise = {b.name: [b.noise * low / scatter, b.noise * high * scatter] for b in bands}
    training_range = {"noise": noise, "psf_fwhm": list(config.scene.psf_fwhm_range)}
    return training_range, {"type": "gaussian", "sigma": MODEL_SIGMA}, size // 2


def _describe(config: TrainingConfig) -> str:
    p, s = config.population, config.scene
    source = "the embedded COSMOS-like model" if p.cosmos_directory is None else "a COSMOS catalogue"
    if config.composition == "blends":
        real = "" if p.real_catalogue is None else f", {100 * p.real_fraction:g} percent real images"
        return (
            f"{p.n_train} galaxies of {source}{real}, {p.mag_range[0]:g} < i < {p.mag_range[1]:g} and "
            f"{', '.join(f'{b} < {m:g}' for b, m in p.faintest.items())}; blends of 1 "
            f"to {config.blend.max_galaxies} as in Arcelin et al. (2020), decentring: "
            f"{config.blend.decentring}; fixed PSF and depth of {config.survey}, Poisson noise."
        )
    return (
        f"{p.n_train} galaxies of {source}, {p.mag_range[0]:g} < i < {p.mag_range[1]:g}, and stars, "
        f"in fields of {s.density_range[0]:g} to {s.density_range[1]:g} sources per square arcmin; "
        f"PSF FWHM {s.psf_fwhm_range[0]:g} to {s.psf_fwhm_range[1]:g} arcsec, ellipticity to "
        f"{s.psf_max_ellipticity:g}; noise {s.noise_range[0]:g} to {s.noise_range[1]:g} times that of "
        f"{config.survey}'s full exposure in surveycodex{_describe_extras(s)}."
    )


def _describe_extras(s: SceneConfig) -> str:
    """What scenes have beyond the default ones."""
    low, high = s.noise_correlation
    extras = [
        (high, f"noise of neighbouring pixels correlated by {low:g} to {high:g}"),
        (s.sky_error, f"sky left over up to {s.sky_error:g} of the noise"),
        (
            s.saturated_fraction,
            f"bright cores masked in {100 * s.saturated_fraction:g} percent of the fields",
        ),
        (s.psf_size > 41, f"PSFs {s.psf_size} pixels wide"),
        (
            s.boosted_fraction,
            f"{100 * s.boosted_fraction:g} percent of the sources up to {s.largest_boost:g} times brighter",
        ),
        (s.odd_colour_fraction, f"{100 * s.odd_colour_fraction:g} percent with colours of no template"),
    ]
    return "".join(f"; {text}" for there, text in extras if there)


def write_card(metadata: NetworkMetadata, path: str | os.PathLike) -> None:
    """Write the card of a network: what it is, what it was trained on, what was measured, and how."""
    m, t = metadata, metadata.training
    ranges = [(b, *m.training_range["noise"][b]) for b in m.bands]
    noise = ", ".join(f"{b} {low:.2g}-{high:.2g}" for b, low, high in ranges)
    narrow, wide = m.training_range["psf_fwhm"]
    hours = ", ".join(f"{step} {spent:g}" for step, spent in t.get("hours", {}).items())
    size, pixel = m.cutout_size, [int(c) if c == int(c) else c for c in m.centre]
    frame = f"{m.frame['type']}, "
    if m.frame["type"] == "gaussian":
        frame += f"sigma {m.frame['sigma']} pixel"
    else:
        frame += "FWHM " + ", ".join(f"{b} {m.frame['fwhm'][b]:g}" for b in m.bands) + " arcsec"
    lines = [
        f"# {m.name}",
        "",
        f"Deblender for {' '.join(m.bands)} coadds at {m.pixel_scale:g} arcsec per pixel.",
        "",
        "| property | value |",
        "|---|---|",
        f"| cutout | {size} x {size} pixels, target in pixel {pixel} (y, x) |",
        f"| latent variables | {m.latent_size} |",
        f"| model frame | {frame} |",
        f"| PSF FWHM in training | {narrow:g} to {wide:g} arcsec |",
        f"| noise in training (nJy per pixel) | {noise} |",
        f"| samples | {training_length(t)} |",
        f"| hours of training | {hours or 'unknown'} |",
        f"| training configuration (sha256) | {t['config_sha256']} |",
        f"| code | {t['git_commit']} |",
        f"| licence | {m.licence} |",
        "",
        f"Training set: {t['description']}",
        "",
        "Made and measured by",
        "",
        "```",
        t["command"],
        "```",
        "",
        "One pass on blends of galaxies held out from training, at the true pixel, no flux solve:",
        "",
        "| figure | value |",
        "|---|---|",
    ]
    for key, value in m.figures_of_merit.items():
        if key != "command":
            lines.append(f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |")
    with whole_file(path) as part:
        part.write_text("\n".join(lines) + "\n")

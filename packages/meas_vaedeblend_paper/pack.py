# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the files of this distribution from those that `vaedeblend export` wrote.

    python pack.py EXPORTED python/meas_vaedeblend_paper

Every network becomes an encoder; its decoder is stored once for all networks that have the same. Large
tensors get 7 bits. What that changes is measured on simulated blends, and is in each card.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import onnx
from lsst.meas.vaedeblend.evaluation.paper import CASES, PRIORS
from lsst.meas.vaedeblend.evaluation.paper_sample import SampleMaker
from lsst.meas.vaedeblend.ground.files import shipped_file
from lsst.meas.vaedeblend.network import Network, NetworkMetadata, embed_metadata, graph_sha256
from lsst.meas.vaedeblend.simulation.config import load_config
from lsst.meas.vaedeblend.training.export import write_card
from lsst.meas.vaedeblend.training.packing import pack_weights, split_decoder, split_encoder, unpack_weights

DECODERS = {
    "arcelin2020_lsst": "arcelin2020_lsst",
    "arcelin2020_lsst_prior": "arcelin2020_lsst",
    "arcelin2020_lsst_euclid": "arcelin2020_lsst_euclid",
    "arcelin2020_lsst_euclid_prior": "arcelin2020_lsst_euclid",
    "arcelin2020_transfer": "arcelin2020_lsst_euclid",
    "arcelin2020_decentred_uniform": "arcelin2020_decentred_uniform",
    "arcelin2020_decentred_peaks": "arcelin2020_decentred_peaks",
}
"""Network to the one whose decoder it has: deblenders keep that of their prior."""

BLENDS = 256
"""Simulated blends on which packed networks are compared with exported ones."""

_C = "config/training/arcelin2020"
_FIRST = (
    "vaedeblend simulate {c}_{n}.py DATA",
    "vaedeblend train {c}_{n}_first.py DATA FIRST",
)
_CENTRED = (
    *_FIRST,
    "vaedeblend train {c}_{n}.py DATA RUN --step deblender --initial FIRST/deblender/final.ckpt",
    "vaedeblend export {c}_{n}.py DATA RUN OUT",
)
_PRIOR = (*_FIRST, "vaedeblend export {c}_{n}.py DATA FIRST OUT --step prior")
_DECENTRED = (
    "vaedeblend simulate {c}_{n}.py DATA",
    "vaedeblend train {c}_{n}.py DATA RUN --initial-prior FIRST_LSST/prior/final.ckpt "
    "--initial RUN_LSST/deblender/final.ckpt",
    "vaedeblend export {c}_{n}.py DATA RUN OUT",
)
_TRANSFER = (
    "vaedeblend simulate {c}_{n}.py DATA",
    "vaedeblend train {c}_{n}.py DATA RUN --step deblender --initial arcelin2020_lsst_euclid",
    "vaedeblend export {c}_{n}.py DATA RUN OUT",
)
RECIPES = {"lsst": _CENTRED, "lsst_euclid": _CENTRED, "lsst_prior": _PRIOR, "lsst_euclid_prior": _PRIOR}
RECIPES |= {"decentred_uniform": _DECENTRED, "decentred_peaks": _DECENTRED, "transfer": _TRANSFER}
"""The commands that made a network, as the documentation of the training has them."""


def recipe(name: str) -> str:
    """Commands that make a network of this distribution."""
    kind = name.removeprefix("arcelin2020_")
    lines = [line.format(c=_C, n=kind.removesuffix("_prior")) for line in RECIPES[kind]]
    return "\n".join([*lines, "python packages/meas_vaedeblend_paper/pack.py OUT FOLDER"])


def blends(name: str) -> np.ndarray:
    """Images of test galaxies in a network's bands, isolated ones for a prior, (N, B, S, S) nJy."""
    config = load_config(shipped_file(f"config/training/{name.removesuffix('_prior')}.py"))
    # The galaxies of the real catalogue may not be there, and the rounding does not ask for them.
    config.population.real_catalogue = None
    composer = SampleMaker(config, 100, seed=7).composer(isolated=name.endswith("_prior"))
    return np.stack([composer.blend().image for _ in range(BLENDS)]).astype(np.float32)


def compare(exported: Network, packed: Network, image: np.ndarray) -> dict[str, float]:
    """Say what packing changed: of models (relative root mean square), of latents, of r-band fluxes."""
    n, bands = len(image), exported.metadata.bands
    ones = np.ones(image.shape[:2], np.float32)
    inputs = (image, np.ones_like(image), ones, np.ones((*image.shape[:2], 3), np.float32))
    old, new = exported.deblend(*inputs), packed.deblend(*inputs)
    if not (old.finite.all() and new.finite.all()):
        raise ValueError(f"{packed.path}: not all of {n} models are finite.")
    band = bands.index("r")
    ratio = new.model[:, band].sum(axis=(1, 2)) / old.model[:, band].sum(axis=(1, 2))
    shift = np.abs(new.latent_mean - old.latent_mean) / old.latent_sigma
    rms = np.sqrt(((new.model - old.model) ** 2).sum() / (old.model**2).sum())
    return {
        "packing_model_rms": float(rms),
        "packing_latent_median": float(np.median(shift)),
        "packing_flux_median": float(np.median(ratio) - 1),
        "packing_flux_std": float(np.std(ratio)),
    }


def pack(exported: Path, out: Path) -> None:
    """Write all files and cards."""
    models = {name: onnx.load(exported / f"{name}.onnx") for name in DECODERS}
    graphs: dict[str, bytes] = {}
    documents: dict[str, NetworkMetadata] = {}
    for name, base in DECODERS.items():
        documents[name] = Network.load(exported / f"{name}.onnx").metadata
        if name == base:
            beside = exported / f"{name}_decoder.onnx"
            pattern = onnx.load(beside if beside.is_file() else exported / "arcelin2020_lsst_decoder.onnx")
            decoder = split_decoder(models[name], pattern)
            graphs[name] = pack_weights(decoder).SerializeToString()
        mine, theirs = (unpack_weights(models[key]) for key in (name, base))
        for key in mine:
            if key.startswith("decoder.") and not np.array_equal(mine[key], theirs[key]):
                raise ValueError(f"{name}: {key} is not that of {base}.")

    def write(name: str, merit: dict[str, float]) -> None:
        base, old = DECODERS[name], documents[name]
        commands = recipe(name)
        own = dataclasses.replace(
            old,
            training={**old.training, "command": commands},
            figures_of_merit={**old.figures_of_merit, **merit, "command": commands},
            decoder="" if name == base else base,
            decoder_sha256=graph_sha256(graphs[base]),
        )
        encoder = pack_weights(split_encoder(models[name])).SerializeToString()
        (out / f"{name}.onnx").write_bytes(embed_metadata(encoder, own))
        if name == base:
            document = dataclasses.replace(own, kind="decoder", decoder_sha256="")
            (out / f"{name}_decoder.onnx").write_bytes(embed_metadata(graphs[name], document))
        write_card(own, out / f"{name}.md")

    for name in DECODERS:
        write(name, {})
    for name in DECODERS:
        old, new = (Network.load(folder / f"{name}.onnx", threads=1) for folder in (exported, out))
        merit = compare(old, new, blends(name))
        print(name, merit)
        write(name, merit)


def main() -> None:
    assert set(DECODERS) == {c.config for c in CASES.values()} | {"arcelin2020_lsst", *PRIORS.values()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exported", type=Path, help="folder of the exported networks")
    parser.add_argument("out", type=Path, help="folder of this distribution's files")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pack(arguments.exported, arguments.out)


if __name__ == "__main__":
    main()

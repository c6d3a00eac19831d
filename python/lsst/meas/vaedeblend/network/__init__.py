# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ONNX artefact: its contract, loading, checking and running.

One file holds what one network needs at run time. Images go in and out in nJy per pixel, every normalisation
is inside the graph, and what the runtime must know about it (bands in order, pixel scale, cutout size, frame
of the model ...) is a JSON document among the file's metadata, `NetworkMetadata`. Nothing of a file is
believed before it has been checked, and every check that fails raises `NetworkError` with both sides in its
message.

Inputs of a deblender: ``image`` (N, B, S, S) nJy, ``valid`` (N, B, S, S) 0 or 1, ``noise`` (N, B) nJy,
``psf_moments`` (N, B, 3) pixel^2, ``epsilon`` (N, L); a graph may leave out any of them but ``image``.
Outputs: ``model`` (N, B, S, S) nJy, ``latent_mean`` and ``latent_sigma`` (N, L). A decoder takes ``latent``
(N, L) to ``model``. A deblender's graph may leave the output ``model`` to the decoder, which several networks
of one prior can share: then the two together are the network. Networks that draw Gaussians have two files
more, with which latents are fitted to pixels: ``render`` draws sources on squares of any width through the
kernels of any PSFs, and ``linearise`` gives gradient and Gauss-Newton matrix of chi-square; `Render` and
`Linearise` have their inputs and outputs.

Notes
-----
From the bottom to the top, each module importing only from those above it in this list:

``_metadata``
    The document, and the error of everything here.
``_onnx``
    Document and checksum in the bytes of a model.
``_files``
    Names, paths and the reading of files.
``_session``
    A file in a session of onnxruntime.
``_networks``
    Deblender, decoder, and the graphs that latents are fitted with.
"""

from __future__ import annotations

from ._files import read_metadata, read_model, resolve, shipped_networks
from ._metadata import CONTRACT_VERSION, NetworkError, NetworkMetadata
from ._networks import (
    Decoder,
    Linearisation,
    Linearise,
    Mixture,
    Network,
    NetworkOutput,
    Render,
    load_network,
)
from ._onnx import METADATA_KEY, embed_metadata, graph_sha256

__all__ = [
    "CONTRACT_VERSION",
    "METADATA_KEY",
    "Decoder",
    "Linearisation",
    "Linearise",
    "Mixture",
    "Network",
    "NetworkError",
    "NetworkMetadata",
    "NetworkOutput",
    "Render",
    "embed_metadata",
    "graph_sha256",
    "load_network",
    "read_metadata",
    "read_model",
    "resolve",
    "shipped_networks",
]

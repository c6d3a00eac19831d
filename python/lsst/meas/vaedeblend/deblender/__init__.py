# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The iterative procedure: peaks, network, joint fluxes, refinement, new peaks in the residual.

Peak detection and peak-centred deblending alternate, as Arcelin et al. (2021, MNRAS 500, 531, section 5.1)
propose. The residual is always the original image minus the current models of all sources. All parents of a
scene share the batches that go through the network, and a source never loses its row: what went wrong with it
is in its flags.

Notes
-----
From the bottom to the top, each module importing only from those above it in this list:

``_config``
    The configuration.
``_drawing``
    From cutouts and latents to images, for both kinds of networks.
``_rows``
    The sources while the procedure runs.
``_state``
    The scene, its sources and the residual, kept in step.
``_fluxes``
    Joint fluxes of sources that overlap; `lsst.meas.vaedeblend.inference.fluxes` has the mathematics.
``_passes``
    Cutouts through the network, and what stands in where it fails.
``_refinement``
    Latents fitted to the pixels; `lsst.meas.vaedeblend.inference.groups` has the mathematics.
``_start``
    The peaks to start from.
``_pruning``
    Which sources earn their place.
``_trials``
    New peaks in the residual.
``_flags``, ``_result``
    What is handed back.
``_procedure``
    The order of all this.
"""

from __future__ import annotations

from ._config import DeblendConfig
from ._procedure import deblend
from ._result import DeblendResult

__all__ = ["DeblendConfig", "DeblendResult", "deblend"]

# Saved configurations name the module of their class: this one, which stays where it is.
DeblendConfig.__module__ = __name__

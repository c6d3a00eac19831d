# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""PipelineTasks."""

from .deblend import NoFiniteModelError, VaeDeblendConfig, VaeDeblendConnections, VaeDeblendTask
from .tract import JoinTractConfig, JoinTractConnections, JoinTractTask

__all__ = [
    "JoinTractConfig",
    "JoinTractConnections",
    "JoinTractTask",
    "NoFiniteModelError",
    "VaeDeblendConfig",
    "VaeDeblendConnections",
    "VaeDeblendTask",
]

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""PipelineTasks."""

from .deblend import NoFiniteModelError, VaeDeblendConfig, VaeDeblendConnections, VaeDeblendTask

__all__ = ["NoFiniteModelError", "VaeDeblendConfig", "VaeDeblendConnections", "VaeDeblendTask"]

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sphinx configuration of a single-package build, see the Rubin developer guide."""

from documenteer.conf.pipelinespkg import *  # noqa: F403

project = "meas_vaedeblend"
html_theme_options["logotext"] = project  # noqa: F405
html_title = project
html_short_title = project

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sphinx configuration of a single-package build.

In an LSST stack documenteer configures it, see the Rubin developer guide. Released versions of documenteer
have no configuration for packages of the pipelines any more: elsewhere ``make docs`` builds the pages with Sphinx
alone.
"""

import sys
from pathlib import Path

try:
    from documenteer.conf.pipelinespkg import *  # noqa: F403

    html_theme_options["logotext"] = "meas_vaedeblend"  # noqa: F405
except ImportError:
    from sphinx.ext.autodoc.mock import mock

    sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
    extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_automodapi.automodapi", "lsst_tasks"]
    default_role = "py:obj"
    exclude_patterns = ["_build", "changes", "experiments", "*.md"]
    napoleon_google_docstring = False
    napoleon_use_ivar = True
    suppress_warnings = ["autodoc.mocked_object"]
    autodoc_typehints = "none"
    automodapi_inheritance_diagram = False
    # What only the stack has is stood in for, so that its modules are documented too.
    autodoc_mock_imports = [
        f"lsst.{name}"
        for name in ("afw", "cell_coadds", "geom", "meas.base", "meas.extensions", "pex.exceptions", "skymap")
    ]
    _stand_ins = mock(autodoc_mock_imports)  # kept: they are gone when it is
    _stand_ins.__enter__()

project = "meas_vaedeblend"
html_title = project
html_short_title = project

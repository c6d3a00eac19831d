# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The directives of task pages, for builds without the Rubin build of documenteer.

What pipelines.lsst.io renders with documenteer's own directives is rendered here in a plainer form: settings
with types, defaults and meaning, subtasks, and the list of tasks.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def _config(name: str) -> Any:
    """The configuration of a task, or `None` where what the task needs is not installed."""
    module, _, task = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), task).ConfigClass
    except (ImportError, TypeError, AttributeError):
        return None


class _Generated(SphinxDirective):
    """A directive whose content is made from the name of a task."""

    required_arguments = 1

    def lines(self, name: str) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        node = nodes.section()
        node.document = self.state.document
        lines = self.lines(self.arguments[0])
        self.state.nested_parse(StringList(lines, self.get_location()), self.content_offset, node)
        return node.children


class TaskTopic(Directive):
    """Marks a page as that of a task; nothing is rendered."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return []


class ApiSummary(_Generated):
    """A link to the class."""

    def lines(self, name: str) -> list[str]:
        return [f"See :py:class:`{name}`."]


def _fields(config: Any, prefix: str = "") -> list[str]:
    """Describe the settings of a configuration and of those in it, by the names by which they are set."""
    from lsst.pex.config import ConfigField, DictField, ListField

    lines: list[str] = []
    for name, field in sorted(config._fields.items()):
        value = getattr(config, name)
        if name == "connections":
            continue
        if isinstance(field, ConfigField):
            lines += _fields(value, f"{prefix}{name}.")
            continue
        # Defaults are those of the task, which may set others than the fields' own.
        if isinstance(field, ListField):
            kind, value = f"list of {field.itemtype.__name__}", list(value)
        elif isinstance(field, DictField):
            kind, value = "mapping", dict(value)
        else:
            kind = getattr(field.dtype, "__name__", type(field).__name__)
        default = "" if kind.endswith("Field") else f", default ``{value!r}``"
        lines += [f"``{prefix}{name}`` ({kind}{default})", f"   {' '.join(field.doc.split())}", ""]
    return lines


class ConfigFields(_Generated):
    """Settings of a task."""

    def lines(self, name: str) -> list[str]:
        config = _config(name)
        if config is None:
            return ["The settings are listed where the LSST stack is installed."]
        return _fields(config())


class ConfigSubtasks(_Generated):
    """Subtasks of a task."""

    def lines(self, name: str) -> list[str]:
        from lsst.pex.config import ConfigurableField

        config = _config(name)
        if config is None:
            return ["The subtasks are listed where the LSST stack is installed."]
        lines: list[str] = []
        for key, field in sorted(config._fields.items()):
            if isinstance(field, ConfigurableField):
                lines += [f"``{key}``", f"   {' '.join(field.doc.split())}", ""]
        return lines or ["None."]


class Tasks(_Generated):
    """The pages of all tasks."""

    required_arguments = 0
    option_spec = {"root": directives.unchanged_required, "toctree": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        self.arguments = [""]
        return super().run()

    def lines(self, name: str) -> list[str]:
        folder = Path(self.env.doc2path(self.env.docname)).parent / self.options["toctree"]
        pages = sorted(f"{self.options['toctree']}/{path.stem}" for path in folder.glob("*.rst"))
        return [".. toctree::", "   :maxdepth: 1", "", *(f"   {page}" for page in pages)]


def _escape_bars(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep bars of absolute values in docstrings, which would name substitutions."""
    lines[:] = [line if "``" in line else line.replace("|", "\\|") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("lsst-task-topic", TaskTopic)
    app.add_directive("lsst-task-api-summary", ApiSummary)
    app.add_directive("lsst-task-config-fields", ConfigFields)
    app.add_directive("lsst-task-config-subtasks", ConfigSubtasks)
    app.add_directive("lsst-pipelinetasks", Tasks)
    app.connect("autodoc-process-docstring", _escape_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

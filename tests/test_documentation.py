# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the documentation names is there: files, modules, commands with their options, settings."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.simulation.config import TrainingConfig
from lsst.meas.vaedeblend.tasks import VaeDeblendConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "lsst" / "meas" / "vaedeblend"
# Pages on experiments speak of what there was at their time.
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "doc").glob("*.md")),
    *sorted((ROOT / "doc").glob("lsst*/**/*.rst")),
]
MARKDOWN = [
    *PAGES,
    *sorted((ROOT / "doc" / "experiments").glob("*.md")),
    *sorted(PACKAGE.glob("artefacts/*.md")),
]


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", MARKDOWN, ids=ids(MARKDOWN))
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_files_that_are_named_exist(page):
    top = "benchmarks|bps|config|doc|pipelines|tests"
    for name in re.findall(
        rf"(?<![\w/.-])((?:{top})/[\w./-]+\.(?:py|yaml|md|rst|ipynb))\b", page.read_text()
    ):
        if "NAME" in name:  # stands for any
            continue
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_modules_and_their_contents_exist(page):
    for name in set(re.findall(r"`~?lsst\.meas\.vaedeblend((?:\.\w+)+)`", page.read_text())):
        parts = name.strip(".").split(".")
        # What needs the stack cannot be imported everywhere: its file has to name it.
        for k in range(len(parts), -1, -1):
            file = PACKAGE.joinpath(*parts[:k])
            if file.is_dir() or file.with_suffix(".py").is_file():
                break
        if parts[k:]:
            text = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
            assert re.search(rf"\b{parts[k]}\b", text), name


def _commands(text: str) -> list[list[str]]:
    """Words of each command line that starts with the package's name, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"(?:^[ ]*|`)vaedeblend ([^`\n]*)", text, re.MULTILINE)
    return [line.split("#")[0].split(";")[0].split() for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_and_their_options_exist(page):
    for words in _commands(page.read_text()):
        command: click.Command = main
        rest = list(words)
        while isinstance(command, click.Group) and rest:
            name = rest.pop(0)
            assert name in command.commands, f"vaedeblend {' '.join(words)}"
            command = command.commands[name]
        known = {
            option for parameter in command.params for option in parameter.opts + parameter.secondary_opts
        }
        for word in rest:
            if re.fullmatch(r"--?[a-z][\w-]*", word):
                assert word in known, f"vaedeblend {' '.join(words)}"


def _has(config, name: str) -> bool:
    """Whether a configuration has a setting of this name, dots for those of nested ones."""
    for part in name.split("."):
        if part not in getattr(config, "_fields", ()):
            return False
        config = getattr(config, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_settings_exist(page):
    config = TrainingConfig() if page.stem == "training" else VaeDeblendConfig()
    for name in re.findall(r"``config\.(?!field )([\w.]+)", page.read_text()):
        assert _has(config, name.rstrip(".")), name
    for name in re.findall(r"``(?:multibandDeblend\.)?(deblend\.[\w.]+)", page.read_text()):
        assert _has(VaeDeblendConfig(), name.rstrip(".")), name

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Models as the in-memory form of the stack's LsstScarletModelData. Needs meas_extensions_scarlet."""

from __future__ import annotations

__all__ = ["from_model_data", "to_model_data"]

import io
from typing import Any

from lsst.meas.extensions.scarlet.io.utils import read_scarlet_model

from .scarlet_file import ScarletModels, read, write


def to_model_data(models: ScarletModels) -> Any:
    """Convert models by way of the file format, whose older versions every release of the stack reads.

    Parameters
    ----------
    models : `lsst.meas.vaedeblend.adapters.scarlet_file.ScarletModels`
        The models.

    Returns
    -------
    data : `lsst.meas.extensions.scarlet.io.LsstScarletModelData`
        What the Butler stores and measurement reads.

    Raises
    ------
    ValueError
        Raised if the pipelines could not use the models.
    """
    stream = io.BytesIO()
    write(stream, models)
    stream.seek(0)
    return read_scarlet_model(stream)


def from_model_data(data: Any) -> ScarletModels:
    """Convert models the other way, by the file format too.

    Parameters
    ----------
    data : `lsst.meas.extensions.scarlet.io.LsstScarletModelData`
        What the Butler gives.

    Returns
    -------
    models : `lsst.meas.vaedeblend.adapters.scarlet_file.ScarletModels`
        The models.

    Raises
    ------
    lsst.meas.vaedeblend.adapters.scarlet_file.ScarletFileError
        Raised if the models are of a kind that is not known here.
    """
    from lsst.meas.extensions.scarlet.io.utils import write_scarlet_model

    stream = io.BytesIO()
    write_scarlet_model(stream, data)
    stream.seek(0)
    return read(stream)

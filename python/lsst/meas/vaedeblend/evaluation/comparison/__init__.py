# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deblenders side by side on the same images: who is better, in what, and by how much.

Notes
-----
From the bottom to the top, each module importing only from those above it in this list:

``patches``
    The images, with the truth where it is known.
``entrants``
    Any deblender's objects with their images, from its files; ``sextractor`` runs sep.
``matching``
    Which object is which.
``measures``
    Columns by object: alone, against another deblender's, against the truth.
``statistics``
    Numbers over many objects with errors, and verdicts.
``result``
    All of it on all patches.
``pictures``, ``report``
    Plots, cut-outs, and the HTML file.
``run``
    The command.
"""

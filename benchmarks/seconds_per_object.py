# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Time the deblending of a simulated patch, per object, for several numbers of threads.

usage: python benchmarks/seconds_per_object.py [--network NAME] [--threads 1 2] [--repeats 3]

The runs of the different settings alternate, so that ratios hold on a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from lsst.meas.vaedeblend.deblender import deblend
from lsst.meas.vaedeblend.evaluation.detection import detection_mask, psf_sigma
from lsst.meas.vaedeblend.evaluation.patch import simulate_patch
from lsst.meas.vaedeblend.network import Network
from lsst.meas.vaedeblend.scene import find_parents


class _Timed:
    """A network that counts the seconds spent inside of it."""

    def __init__(self, network: Network):
        self._network, self.seconds, self.cutouts = network, 0.0, 0

    def __getattr__(self, name):
        return getattr(self._network, name)

    def deblend(self, image, *args, **kwargs):
        start = time.perf_counter()
        output = self._network.deblend(image, *args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.cutouts += len(image)
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="lsst_ugrizy")
    parser.add_argument("--survey", default="LSST")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    networks = {n: Network.load(arguments.network, threads=n) for n in arguments.threads}
    metadata = next(iter(networks.values())).metadata
    patch = simulate_patch(1, survey=arguments.survey, bands=metadata.bands)
    valid = np.ones(patch.image.shape, bool)
    width = np.median(psf_sigma(patch.psf).reshape(len(metadata.bands), -1), axis=1)
    detected = detection_mask(patch.image, patch.variance, valid, width).any(axis=0)
    scene = patch.scene(find_parents(detected))
    seconds: dict[int, list[tuple[float, float]]] = {n: [] for n in networks}
    for repeat in range(arguments.repeats + 1):
        for n, network in networks.items():
            timed = _Timed(network)
            start = time.perf_counter()
            result = deblend(scene, timed)
            elapsed = time.perf_counter() - start
            # The first round warms caches and is not counted.
            if repeat:
                seconds[n].append((elapsed, timed.seconds))
            count, cutouts = len(result.sources), timed.cutouts
    print(f"{metadata.name}: {count} objects, {cutouts / count:.1f} cutouts per object")
    print("threads  ms per object: all  network  rest")
    for n, times in seconds.items():
        total = 1e3 * statistics.median(t for t, _ in times) / count
        inside = 1e3 * statistics.median(t for _, t in times) / count
        print(f"{n:7d}  {total:18.2f}  {inside:7.2f}  {total - inside:4.2f}")


if __name__ == "__main__":
    main()

# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Time the deblending of a simulated patch, per object, for several numbers of threads.

usage: python benchmarks/seconds_per_object.py [--network NAME] [--threads 1 2] [--repeats 3]
           [--refinement-steps 0]

The runs of the different settings alternate, so that ratios hold on a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from lsst.meas.vaedeblend.deblender import DeblendConfig, deblend
from lsst.meas.vaedeblend.evaluation.detection import detection_mask, psf_sigma
from lsst.meas.vaedeblend.network import Network
from lsst.meas.vaedeblend.scene import find_parents
from lsst.meas.vaedeblend.simulation.patch import simulate_patch


class _Clock:
    """Counts the seconds that a network's graphs run."""

    def __init__(self, network: Network):
        self.seconds = 0.0
        artefacts = [network, network.decoder]
        if network.can_fit:
            artefacts += [network.render, network.linearise]
        for artefact in artefacts:
            artefact.run = self._timed(artefact.run)

    def _timed(self, run):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            output = run(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return output

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="lsst_ugrizy")
    parser.add_argument("--survey", default="LSST")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--refinement-steps", type=int)
    arguments = parser.parse_args()

    networks = {n: Network.load(arguments.network, threads=n) for n in arguments.threads}
    clocks = {n: _Clock(network) for n, network in networks.items()}
    config = DeblendConfig()
    if arguments.refinement_steps is not None:
        config.refinementSteps = arguments.refinement_steps
    metadata = next(iter(networks.values())).metadata
    patch = simulate_patch(1, survey=arguments.survey, bands=metadata.bands)
    valid = np.ones(patch.image.shape, bool)
    width = np.median(psf_sigma(patch.psf).reshape(len(metadata.bands), -1), axis=1)
    detected = detection_mask(patch.image, patch.variance, valid, width).any(axis=0)
    scene = patch.scene(find_parents(detected))
    seconds: dict[int, list[tuple[float, float]]] = {n: [] for n in networks}
    for repeat in range(arguments.repeats + 1):
        for n, network in networks.items():
            clocks[n].seconds = 0.0
            start = time.perf_counter()
            result = deblend(scene, network, config)
            elapsed = time.perf_counter() - start
            # The first round warms caches and is not counted.
            if repeat:
                seconds[n].append((elapsed, clocks[n].seconds))
            count = len(result.sources)
    print(f"{metadata.name}: {count} objects, {config.refinementSteps} steps of refinement")
    print("threads  ms per object: all  graphs  rest")
    for n, times in seconds.items():
        total = 1e3 * statistics.median(t for t, _ in times) / count
        inside = 1e3 * statistics.median(t for _, t in times) / count
        print(f"{n:7d}  {total:18.2f}  {inside:6.2f}  {total - inside:4.2f}")


if __name__ == "__main__":
    main()

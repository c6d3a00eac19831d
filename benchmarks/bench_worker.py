# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of `bench.py` that runs in a process of its own, with the code of one checkout.

It takes jobs as lines of JSON and answers each with a line. It uses only what the checkouts that are compared
have in common, so that one file serves all of them.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "lsst.meas.vaedeblend"

PYTHON = {
    "group solves": (
        "inference.groups.GaussNewton.step",
        "inference.groups.GaussNewton.covariances",
        "inference.fluxes.joint_fluxes",
        "refine.LinearisedModels.step",
        "refine.LinearisedModels.covariances",
        "fluxes.joint_fluxes",
    ),
    "peak search": ("deblender._start._find", "deblender._trials._find"),
    "normal matrices": ("refine.LinearisedModels.__init__",),
    "images through PSFs": ("rendering.Renderer.observed", "models.Renderer.observed"),
    "set-up": ("deblender._state.State.__init__", "deblender._start.place_first"),
    "first answers": ("deblender._passes.first_answers", "deblender._passes.take_pass"),
    "refinement": ("deblender._refinement.refine",),
    "trials, pruning": ("deblender._trials.try_peaks", "deblender._pruning.drop"),
    "posterior": ("deblender._refinement.set_posterior",),
    "results": ("deblender._result.assemble",),
}
"""Functions that make up a stage, in some of the checkouts. What they call in graphs, kernels and LAPACK does
not count as theirs."""

LAPACK = ("solve", "inv", "cholesky", "eigh", "lstsq")


class Stages:
    """CPU time by stage: that of what a stage calls counts for the stage that was called."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._within: list[float] = []
        self._kind = "?"

    def run(self, function: Callable, name: str = "rest") -> Any:
        """Run a function and return its result."""
        return self._wrapped(function, name)()

    def _wrapped(self, function: Callable, name: str) -> Callable:
        def timed(*args, **kwargs):
            self._within.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - start
                self.seconds[name.format(kind=self._kind)] += whole - self._within.pop()
                if self._within:
                    self._within[-1] += whole

        return timed

    def install(self) -> None:
        """Wrap graphs, compiled kernels, LAPACK and the functions of `PYTHON`."""
        import numba.core.registry
        import onnxruntime

        artefact = importlib.import_module(f"{PACKAGE}.network._session").Artefact
        name = "run" if hasattr(artefact, "run") else "_run"
        feed = self._wrapped(getattr(artefact, name), "feeding graphs")

        def run(artefact, *args, **kwargs):
            before, self._kind = self._kind, artefact.kind
            try:
                return feed(artefact, *args, **kwargs)
            finally:
                self._kind = before

        setattr(artefact, name, run)
        for name in ("run", "run_with_ort_values", "run_with_iobinding"):
            method = getattr(onnxruntime.InferenceSession, name)
            setattr(onnxruntime.InferenceSession, name, self._wrapped(method, "graph: {kind}"))
        for name in LAPACK:
            setattr(np.linalg, name, self._wrapped(getattr(np.linalg, name), "LAPACK"))
        dispatcher = numba.core.registry.CPUDispatcher
        kernels = {id(v): v for m in _modules() for v in vars(m).values() if isinstance(v, dispatcher)}
        called = {name for kernel in kernels.values() for name in kernel.py_func.__code__.co_names}
        for kernel in kernels.values():
            # One that others call has to stay what their compiler knows.
            if kernel.py_func.__name__ not in called:
                _replace(kernel, self._wrapped(kernel, "kernels (numba)"))
        for stage, names in PYTHON.items():
            for name in names:
                self._install_python(name, f"python: {stage}")

    def _install_python(self, name: str, stage: str) -> None:
        *path, attribute = name.split(".")
        owner = None
        if path[-1][0].isupper():
            *path, owner = path
        try:
            home = importlib.import_module(".".join([PACKAGE, *path]))
            home = home if owner is None else getattr(home, owner)
            function = getattr(home, attribute)
        except (ImportError, AttributeError):
            return
        wrapped = self._wrapped(function, stage)
        if owner is None:
            _replace(function, wrapped)
        else:
            setattr(home, attribute, wrapped)


def _modules() -> list[Any]:
    return [m for name, m in list(sys.modules.items()) if name.startswith(PACKAGE) and m is not None]


def _replace(old: Any, new: Any) -> None:
    """Replace a function under all names that modules of the package have for it."""
    for module in _modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


class Worker:
    """Deblends what it is told to.

    Parameters
    ----------
    network : `str`
        Name or path of the network; a name is that of the checkout's own.
    threads : `int`
        Threads of onnxruntime.
    settings : `dict`
        Settings of the procedure, named as in this checkout.
    """

    def __init__(self, network: str, threads: int, settings: dict[str, Any]) -> None:
        self._deblender = importlib.import_module(f"{PACKAGE}.deblender")
        self._scene = importlib.import_module(f"{PACKAGE}.scene")
        self._network = importlib.import_module(f"{PACKAGE}.network").load_network(network, threads=threads)
        self._name, self._threads, self._settings = network, threads, settings
        self._stages: Stages | None = None

    def about(self) -> dict[str, Any]:
        """What runs here."""
        metadata = self._network.metadata
        return {"network": metadata.name, "weights_sha256": metadata.weights_sha256}

    def stages(self) -> dict[str, Any]:
        """Count stages from now on. What kernels need has to be compiled by now."""
        self._stages = Stages()
        self._stages.install()
        return {}

    def scene(self, path: str) -> dict[str, Any]:
        """Deblend a scene that `bench_scenes.write` has written."""
        folder = Path(path)
        with np.load(folder / "scene.npz") as data:
            about = dict(data)
        image, variance = np.load(folder / "image.npy"), np.load(folder / "variance.npy")
        detected = np.load(folder / "detected.npy")
        given = bool(about["given"])
        if given:
            footprints = importlib.import_module(f"{PACKAGE}.adapters.footprints")
            parents = footprints.parents_from_peaks(detected, about["peaks"])
        else:
            parents = self._scene.find_parents(detected)
        grid = self._scene.PsfGrid(about["psf"], tuple(about["cell_shape"]), tuple(about["grid_shape"]))
        bands = tuple(str(band) for band in about["bands"])
        scale = float(about["pixel_scale"])
        scene = self._scene.Scene(bands, image, variance, psf=grid, pixel_scale=scale, parents=parents)
        coadds = sum(a.nbytes for a in (scene.image, scene.variance, scene.valid))
        del image, variance, detected
        return {**self._deblend(scene, {"findNewPeaks": not given}), "coadd_mb": coadds / 2**20}

    def field(self, path: str, detect: bool) -> dict[str, Any]:
        """Deblend a field."""
        fields = importlib.import_module(f"{PACKAGE}.evaluation.fields")
        field = fields.FieldFile.read(path)
        return {
            **self._deblend(field.scene(self._network.metadata.pixel_scale, detect)),
            "true": len(field.x),
        }

    def evaluate(self, path: str, out: str) -> dict[str, Any]:
        """Deblend all fields of a directory from their true centres, and write models."""
        fields = importlib.import_module(f"{PACKAGE}.evaluation.fields")
        return fields.evaluate_fields(
            path, out, network=self._name, threads=self._threads, config=self._config({})
        )

    def _config(self, settings: dict[str, Any]) -> Any:
        config = self._deblender.DeblendConfig()
        for name, value in {**self._settings, **settings}.items():
            if not hasattr(config, name):
                # Settings had other names once.
                name = re.sub("[A-Z]", lambda found: "_" + found[0].lower(), name)
            setattr(config, name, value)
        return config

    def _deblend(self, scene: Any, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        config = self._config(settings or {})
        if self._stages is not None:
            self._stages.seconds.clear()
        _forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        if self._stages is not None:
            result = self._stages.run(lambda: self._deblender.deblend(scene, self._network, config))
        else:
            result = self._deblender.deblend(scene, self._network, config)
        answer = {
            "cpu": time.process_time() - cpu,
            "wall": time.perf_counter() - wall,
            "peak_mb": _peak_mb(),
            "objects": len(result.sources),
            "parents": len(scene.parents),
        }
        if self._stages is not None:
            answer["stages"] = dict(self._stages.seconds)
        # Some versions draw the observed models only for those who ask.
        cpu = time.process_time()
        _ = result.sources.observed
        answer["draw"] = time.process_time() - cpu
        return answer


def _forget_peak() -> None:
    """Begin to look for the largest memory anew, where the system can: loading is not deblending."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_mb() -> float:
    """Largest memory of this process, MiB."""
    try:
        # That of getrusage counts the memory of the parent process from before the program was loaded.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    kilobytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 1024


def main() -> None:
    # Answers go where standard output went; what libraries print does not come between.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    checkout, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    package = importlib.import_module(PACKAGE)
    if not Path(package.__file__).resolve().is_relative_to(checkout.resolve()):
        raise RuntimeError(f"{package.__file__} was imported, not that of {checkout}.")
    worker = Worker(**settings)
    for line in sys.stdin:
        job = json.loads(line)
        answer = getattr(worker, job.pop("job"))(**job)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

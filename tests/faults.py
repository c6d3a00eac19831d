# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""`pipetask run` in processes that are stopped or starved at chosen points: `python faults.py JOB.json`.

A process that has imported everything once forks one child for each run, which is what makes dozens of runs
affordable. It must not have threads, so it is not the one of the tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def _die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _spoil(fault: dict) -> None:
    """Set a trap in this process: ``point`` says where, ``dataset`` at which."""
    import lsst.meas.vaedeblend.tasks.deblend as task
    from lsst.daf.butler import FormatterV2

    point, dataset = fault["point"], fault.get("dataset")
    if point == "deblended":
        original_patch = task.deblend_patch

        def patch(*args, **keywords):
            original_patch(*args, **keywords)
            _die()

        task.deblend_patch = patch
        return
    write: Callable = FormatterV2.write

    def spoilt(self, in_memory_dataset, /, **keywords):
        if self.dataset_ref.datasetType.name != dataset:
            return write(self, in_memory_dataset, **keywords)
        if point == "before":
            _die()
        if point == "half":
            local = self.write_local_file

            def half(in_memory, uri):
                local(in_memory, uri)
                os.truncate(uri.ospath, os.path.getsize(uri.ospath) // 2)
                _die()

            self.write_local_file = half
        if point == "full":
            # Writing beyond so many bytes fails, as on a disk without room for more.
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], hard))
            try:
                return write(self, in_memory_dataset, **keywords)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        result = write(self, in_memory_dataset, **keywords)
        if point == "after":
            _die()
        return result

    FormatterV2.write = spoilt


def _child(run: dict, log: Path) -> None:
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        if fault := run.get("fault"):
            _spoil(fault)
        if user := run.get("user"):
            os.setuid(user)
        from lsst.ctrl.mpexec.cli.pipetask import cli

        status = 1
        try:
            cli.main(args=["run", *run["arguments"]], prog_name="pipetask", standalone_mode=True)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _fork(run: dict, log: Path) -> int:
    pid = os.fork()
    if not pid:
        _child(run, log)
    return pid


def main(job: Path) -> None:
    """Run the steps of a job, each a list of runs that go at once; write what became of them."""
    import astropy.table  # noqa: F401
    import lsst.ctrl.mpexec.cli.cmd  # noqa: F401
    import lsst.meas.vaedeblend.deblender  # noqa: F401
    import lsst.meas.vaedeblend.tasks.deblend  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    out = []
    for number, step in enumerate(json.loads(job.read_text())):
        logs = [job.with_name(f"{job.stem}_{number}_{i}.log") for i in range(len(step))]
        pids = [_fork(run, log) for run, log in zip(step, logs, strict=True)]
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        out.append(
            [{"status": end, "log": log.read_text()} for end, log in zip(ends, logs, strict=True)]
        )
    with contextlib.suppress(io.UnsupportedOperation):
        sys.stdout.flush()
    job.with_suffix(".out").write_text(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

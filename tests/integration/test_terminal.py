"""Ctrl-C as a terminal sends it: to every process of the foreground group, Dask's workers among them."""

from __future__ import annotations

import os
import pty
import select
import sys
import time

import pytest

pytestmark = pytest.mark.slow

START = """
import sys
import time
from slidecube.cluster.clusters import open_cluster
from slidecube.cluster.resources import Profile, Resources
from slidecube.pipeline import cli, doctor

def checks():
    print("starting", flush=True)
    workers = Resources(cpus=1, mem_gb=1.0)
    opened = open_cluster(Profile(name="d", runner="dask-local", workers=2, worker=workers))
    print("open", flush=True)
    try:
        time.sleep(60)
    finally:
        opened.close(10)

if __name__ == "__main__":
    doctor.checks = checks
    cli.main(["doctor"])
"""


@pytest.mark.parametrize(
    ("sign", "after_s"),
    [("starting", 0.3), ("starting", 1.5), ("starting", 3.0), ("starting", 6.0), ("open", 0.5)],
)
def test_one_line_and_no_tracebacks(tmp_path, sign, after_s):
    script = tmp_path / "start.py"
    script.write_text(START)
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(script)])
    told, code = seen(pid, terminal, sign, after_s)

    lines = [
        line for line in told.replace("^C", "").splitlines() if line and line not in {"starting", "open"}
    ]
    assert lines == ["slidecube: stopped; run the same command to resume"], told
    assert code == 130


def seen(pid: int, terminal: int, sign: str, after_s: float) -> tuple[str, int]:
    """What a process says on its terminal, on which Ctrl-C is typed so long after a sign, and its exit code."""
    told, typed, deadline = b"", 0.0, time.monotonic() + 180
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                told += os.read(terminal, 65536)
            except OSError:  # it ended
                break
        if not typed and sign.encode() in told:
            typed = time.monotonic() + after_s
        if typed and time.monotonic() > typed:
            os.write(terminal, b"\x03")
            typed = deadline
    os.close(terminal)
    return told.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

"""Freed memory stays with a worker, whatever threshold its nanny gave it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHURN = """
import resource
import numpy as np
from slidecube.cluster.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        arrays = [np.ones(500_000) for _ in range(3)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

as_started = faults()
keep_freed_memory()
faults()
print(as_started, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_arrays_come_back_without_the_kernel():
    done = subprocess.run(
        [sys.executable, "-c", CHURN],
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    as_started, after = map(int, done.stdout.split())
    assert as_started > 50 * 3 * 900, "a page is 4096 bytes, and an array 4 MB"
    assert after < as_started / 100

"""A job of a batch system, as its script is made of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from slidecube.cluster.resources import StageRequest

AGAIN = (75, 138)
"""Exit codes after which a job is queued again: drained with work left, and told to before it could listen."""

_SPARE_S = 30
"""A tile that has not ended so long before the walltime is given up: it is done again after the job's next start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One job, or an array of them, which runs a stage.

    command : words; where the index of a shard belongs stands SHARD; request : what each task asks for
    tasks : indices of the array, () = one job without an index; at_once : of them may run, 0 = all
    log : file, in which TASK stands for the index; folder : where it starts
    drain_s : before the walltime it is told to end; max_restarts : how often it is queued again
    prologue : lines of shell before the work; scratch : folder of temporary files, "" = the node's
    """

    name: str
    command: tuple[str, ...]
    request: StageRequest
    log: str
    folder: str
    tasks: tuple[int, ...] = ()
    drain_s: int = 300
    max_restarts: int = 50
    prologue: tuple[str, ...] = ()
    scratch: str = ""


SHARD = "@shard@"
"""In a command's words: the index of the shard, which the batch system sets."""

TASK = "@task@"
"""In the name of a log: the index of the shard."""


def command_line(job: BatchJob, index: str) -> str:
    """Quote a command for the shell; index : the shell's variable of the array's index."""
    return " ".join(
        f'"{word.replace(SHARD, f"${{{index}}}")}"' if SHARD in word else shlex.quote(word)
        for word in job.command
    )


def prepare(job: BatchJob) -> list[str]:
    """Lines of shell before the work: the site's own, and where temporary files go."""
    lines = list(job.prologue)
    if job.scratch:
        # a variable that a site does not set, or a disk that a node lacks, must not cost every job of an array
        lines += [
            f'scratch="{job.scratch}"',
            'if [ -n "$scratch" ] && mkdir -p "$scratch"; then',
            '  export TMPDIR="$scratch"',
            "else",
            "  echo \"no scratch folder '$scratch' on $(hostname): temporary files go to ${TMPDIR:-/tmp}\"",
            "fi",
        ]
    return lines


def attend(command: str) -> list[str]:
    """Lines of shell that run a command and pass on what the batch system says to it: the shell itself stays.

    The shell's function `drain` is what differs between systems; afterwards its `code` is that of the command.
    """
    return [
        f"{command} &",
        "work=$!",
        "trap 'heard=1; drain' USR1",
        "trap 'heard=1' TERM INT  # the work hears them from the batch system itself",
        "code=127",
        "while :; do  # a signal ends the waiting, and not the work",
        "  heard=",
        '  wait "$work"',
        "  ended=$?",
        '  [ "$ended" = 127 ] || code=$ended',
        '  [ -n "$heard" ] || break',
        "done",
        '[ -z "${late:-}" ] || kill "$late" 2> /dev/null',
    ]


def give_up_s(drain_s: int) -> int:
    """Seconds after the call to end in which a tile in work may still come to its end."""
    return max(drain_s - _SPARE_S, drain_s // 2)


def ranges(indices: Iterable[int]) -> str:
    """Write indices as batch systems do: 0-3,7,9-12."""
    ordered = sorted(set(indices))
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))

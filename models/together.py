"""One training in several processes of one machine: each computes a share of every batch, on a GPU of its own if any.

The process that asks starts them, hears of them, and ends them all when one ends: nobody waits for the dead. Gradients,
losses and counts of validation are joined; batch norm is joined on GPUs, and each process's own on the CPU, where torch
has no joined one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slidecube.models.errors import DivergedError, ModelError
from slidecube.models.train_settings import TrainSettings

_LAST_WORDS_S = 10.0
"""How long the others may still say why, after one of them ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The processes of a training, seen from one of them."""

    rank: int = 0
    size: int = 1

    def device(self, name: str) -> torch.device:
        """Device of this process."""
        return torch.device(name, self.rank) if name == "cuda" else torch.device(name)

    def prepared(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Join the batch norms of all, where torch can."""
        if self.size == 1 or device.type == "cpu":
            return module
        joined: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return joined

    def joined(self, module: nn.Module) -> nn.Module:
        """Wrap a network so that `backward` gives all processes the mean gradient."""
        return module if self.size == 1 else DistributedDataParallel(module, find_unused_parameters=True)

    def apart(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context of a part that is not the last one of its step: gradients are added up before they are joined."""
        wrapped = getattr(model, "_orig_mod", model)  # of torch.compile
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a number over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(value)
            value /= self.size
        return value

    def total(self, values: np.ndarray, device: torch.device) -> np.ndarray:
        """Sum of an array over all processes."""
        if self.size == 1:
            return values
        tensor = torch.from_numpy(values).to(device)
        torch.distributed.all_reduce(tensor)
        summed: np.ndarray = tensor.cpu().numpy()
        return summed

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's statistics of batch norm, before the network is judged by all."""
        if self.size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)


ALONE = Peers()


def require_devices(settings: TrainSettings) -> None:
    """Raise ModelError unless there is a GPU for each process."""
    if (
        settings.processes > 1
        and settings.device == "cuda"
        and torch.cuda.device_count() < settings.processes
    ):
        raise ModelError(
            f"processes = {settings.processes} need as many GPUs, and there are {torch.cuda.device_count()}; "
            "lower processes in [training]"
        )


def run_together(job: Any, processes: int, told: Callable[[dict[str, Any]], None]) -> None:
    """Run a training's processes to their end; told : of each piece of news, as `Progress` in JSON.

    job : as `train.run` takes it; sent by cloudpickle to Pythons that are started here
    Raises ModelError with the line of the process that failed, or says which one ended and how.
    """
    with tempfile.TemporaryDirectory(prefix="slidecube-") as name:
        folder = Path(name)
        (folder / "job").write_bytes(cloudpickle.dumps(job))
        heard: queue.Queue[tuple[int, str | None]] = queue.Queue()
        children = [_start(folder, rank, processes) for rank in range(processes)]
        listeners = [
            threading.Thread(target=_listen, args=(rank, child.stdout, heard), daemon=True)
            for rank, child in enumerate(children)
        ]
        try:
            for listener in listeners:
                listener.start()
            _follow(children, heard, told, folder)
        finally:
            for child, listener in zip(children, listeners, strict=True):
                child.kill()
                child.wait()
                listener.join()
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        pipe.close()


def _start(folder: Path, rank: int, size: int) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if sys.platform == "linux":
        environment.setdefault(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # all are on this machine, whatever its name resolves to
    with (folder / f"stderr-{rank}").open("wb") as errors:
        return subprocess.Popen(  # noqa: S603  our own interpreter
            [sys.executable, "-m", "slidecube.models.together", str(folder), str(rank), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )


def _listen(rank: int, pipe: IO[str] | None, heard: queue.Queue[tuple[int, str | None]]) -> None:
    for line in pipe or ():
        heard.put((rank, line))
    heard.put((rank, None))


def _follow(
    children: list[subprocess.Popen[str]],
    heard: queue.Queue[tuple[int, str | None]],
    told: Callable[[dict[str, Any]], None],
    folder: Path,
) -> None:
    """Pass news on until all have ended well; the first one that did not ends it."""
    running = len(children)
    while running:
        rank, line = heard.get()
        if line is not None:
            news = json.loads(line)
            if "error" in news:
                raise (DivergedError if news["diverged"] else ModelError)(news["error"])
            told(news)
        elif children[rank].wait() == 0:
            running -= 1
        else:
            raise ModelError(_last_words(heard) or _how_it_ended(children[rank].returncode, rank, folder))


def _last_words(heard: queue.Queue[tuple[int, str | None]]) -> str:
    """Line of another process that says why, in place of the one that only lost its peer."""
    try:
        while True:
            _, line = heard.get(timeout=_LAST_WORDS_S)
            if line is None:
                return ""
            if "error" in json.loads(line):
                return str(json.loads(line)["error"])
    except queue.Empty:
        return ""


def _how_it_ended(code: int, rank: int, folder: Path) -> str:
    said = (folder / f"stderr-{rank}").read_text(errors="replace").strip().splitlines()
    why = (
        f"was killed by signal {-code}" if code < 0 else f"ended: {said[-1] if said else f'exit code {code}'}"
    )
    return f"Process {rank + 1} of the training {why}; start it again, it goes on from its last kept state"


@contextmanager
def _process_group(folder: Path, rank: int, size: int, settings: TrainSettings) -> Iterator[Peers]:
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if settings.device == "cuda" else "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=settings.timeout_s),
    )
    try:
        yield Peers(rank=rank, size=size)
    finally:
        torch.distributed.destroy_process_group()


def _end_with_the_parent() -> None:
    """Nobody hears of a training whose parent is gone: its pipe is closed then."""
    sys.stdin.read()
    os._exit(1)


def main(folder: str, rank: str, size: str) -> int:
    """Be one process of a training."""
    from slidecube.models.train import run  # noqa: PLC0415  it imports this module

    threading.Thread(target=_end_with_the_parent, daemon=True).start()

    def say(news: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(news) + "\n")
        sys.stdout.flush()

    job = cloudpickle.loads((Path(folder) / "job").read_bytes())
    try:
        with _process_group(Path(folder), int(rank), int(size), job.settings) as peers:
            run(job, lambda news: say(asdict(news)), peers)
    except ModelError as error:
        say({"error": str(error), "diverged": isinstance(error, DivergedError)})
        return 1
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a thread waits on standard input

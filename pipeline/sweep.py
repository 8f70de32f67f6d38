"""Many trainings as tasks on any cluster profile, and what is chosen from them.

A sweep is a list of candidates, each with a record in a ledger: what is done stays done, one that fails leaves its
reason and the others go on. A single training is a sweep of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from slidecube.cluster.errors import ClusterError
from slidecube.cluster.pools import open_runner
from slidecube.cluster.resources import Profile, load_profile
from slidecube.cluster.runner import HOPELESS, Runner, TaskResult, TileTask
from slidecube.pipeline.ensembles_chosen import ensembles_of
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.events import GIVEN_UP
from slidecube.pipeline.leaderboard import EnsembleRow, Standing, standings, write_leaderboard
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.progress import progress
from slidecube.pipeline.train_config import (
    Candidate,
    TrainConfig,
    candidates,
    check_losses,
    require_runnable,
)
from slidecube.pipeline.trained_models import (
    Saving,
    is_saved,
    require_null_run,
    save_chosen_ensemble,
    save_single,
    saving_of,
    single_key,
    sweep_key,
)
from slidecube.pipeline.training import (
    Open,
    TrainContext,
    Work,
    done_keys,
    forget_data,
    ledger_of,
    open_candidate_data,
    refusal_of,
    train_task,
    work_of,
)
from slidecube.pipeline.training_checks import check_trainings, warnings_of
from slidecube.pipeline.training_data import Data

STAGE = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a `slidecube train` did.

    trained : candidates that were trained now; there : that were done before; failed : the others, with reasons
    notes : of trainings that are done, what a user should know
    models : folders of what was saved; warnings : what is likely wrong, a line each
    tables : Markdown; files : that were written beside them
    """

    trained: int
    there: int
    failed: tuple[tuple[Work, str], ...] = ()
    notes: tuple[tuple[Work, str], ...] = ()
    models: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    tables: str = ""
    files: tuple[Path, ...] = ()
    complete: bool = True


@dataclass(slots=True, kw_only=True)
class Driver:
    """Who trains the candidates of one TOML in one folder.

    out : of all that is written; open : opens the data of a candidate; say : progress goes there, None = nowhere
    """

    config: TrainConfig
    out: Path
    profile: str | None = None
    open: Open = open_candidate_data
    say: TextIO | None = None
    _data: dict[tuple[tuple[str, ...], str], Data] = field(default_factory=dict)

    def single(self) -> TrainReport:
        """Train the one network of the TOML, and save it as a model."""
        config = self.config
        works = self.planned(sweep=False)
        name, key = config.tables.name, single_key(works[0], config)
        report = self.train(works)
        if report.failed:
            raise PipelineError(report.failed[0][1])
        refusal = refusal_of(self.out, works[0].key)
        if refusal:
            raise PipelineError(refusal)
        folder = save_single(self._saving(works[0]), works[0], name=name, key=key)
        return replace(report, models=(folder,))

    def sweep(self) -> TrainReport:
        """Train everything that [sweep] combines; rank, choose, and save the best network and the best ensemble."""
        config = self.config
        works = self.planned(sweep=True)
        key, names = sweep_key(works, config), self._names(sweep=True)
        report = self.train(works)
        found = standings(self.out, works, {work.key: reason for work, reason in report.failed})
        done = [one for one in found if one.score is not None]
        complete = bool(done) and len(report.failed) <= config.tables.cluster.failure_budget
        rows: list[EnsembleRow] = []
        models: tuple[Path, ...] = ()
        if complete:
            rows = [row for own in _by_setting(done) for row in self._ensembles(own)]
            models = self._save(done, rows, key, names)
        files = write_leaderboard(self.out, found, rows, title=config.tables.name)
        text = files[0].read_text(encoding="utf-8")
        return replace(report, complete=complete, models=models, files=files, tables=text)

    def planned(self, *, sweep: bool) -> list[Work]:
        """Candidates with their keys, after every check that needs no training.

        Raises PipelineError, ModelError or CatalogError for what would be refused later.
        """
        config = self.config
        check_losses(config.path, config.tables, sweep=sweep)
        works = self.works(candidates(config, sweep=sweep))
        key = sweep_key(works, config) if sweep else single_key(works[0], config)
        saved = [is_saved(config, self.out, name, key) for name in self._names(sweep=sweep).values()]
        if not all(saved):
            require_null_run(config, works)
        self.check(works)
        return works

    def check(self, works: Sequence[Work]) -> None:
        """Check the candidates of which something is left to do."""
        done = done_keys(self.out, works)
        due = [work for work in works if work.key not in done]
        if due:
            check_trainings(self.config, due, self.data, runner=self._profile().runner)

    def _names(self, *, sweep: bool) -> dict[str, str]:
        """Names of the models that are saved."""
        name = self.config.tables.name
        return {"single": name, "ensemble": f"{name}-ensemble"} if sweep else {"single": name}

    def _ensembles(self, done: Sequence[Standing]) -> list[EnsembleRow]:
        data = self.data(done[0].work.candidate)
        return ensembles_of(done, data, out=self.out, tables=self.config.tables)

    def _save(
        self, done: Sequence[Standing], rows: Sequence[EnsembleRow], key: str, names: Mapping[str, str]
    ) -> tuple[Path, ...]:
        """Save the single network and the ensemble that are best on validation, whatever their setting."""
        best = min(done, key=lambda one: -(one.score or 0.0))
        saving = self._saving(best.work)
        models = [save_single(saving, best.work, name=names["single"], key=key)]
        if rows:
            chosen = min(rows, key=lambda row: (-row.score, len(row.members)))
            saving = self._saving(chosen.members[0])
            models.append(save_chosen_ensemble(saving, chosen, name=names["ensemble"], key=key))
        return tuple(models)

    def _saving(self, work: Work) -> Saving:
        return saving_of(self.config, self.out, self.data(work.candidate), threads=self.threads)

    @property
    def threads(self) -> int:
        """Threads of one training."""
        return self.config.tables.training.threads or self._profile().worker.cpus

    def works(self, wanted: Iterable[Candidate]) -> list[Work]:
        """Candidates with their keys; data are opened once for each list of features, and as they are now."""
        self._data.clear()
        forget_data()
        found = [work_of(self.config, one, self.data(one)) for one in wanted]
        keys = [work.key for work in found]
        twice = next((work for work in found if keys.count(work.key) > 1), None)
        if twice is not None:
            raise PipelineError(
                f"{self.config.path}: sweep.settings: {twice.candidate.label} is there twice, by equal features under "
                "two names; allowed: each list of features once"
            )
        return found

    def data(self, candidate: Candidate) -> Data:
        """Data of a candidate."""
        which = (candidate.features, candidate.held_out)
        if which not in self._data:
            self._data[which] = self.open(self.config, candidate)
        return self._data[which]

    def train(self, works: Sequence[Work]) -> TrainReport:
        """Train what is not done, and record each.

        Raises IncompleteError when nothing works; what is done stays done.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with Lock(self.out / "locks", run=self.config.tables.name) as lock:
            due, warnings = self._due(works), warnings_of(self.config, works, self.data)
            for line in warnings if due else ():
                self._line(f"warning: {line}")
            failed, notes = self._on_workers(works, due, lock) if due else ({}, {})
        by_key = {work.key: work for work in works}
        return TrainReport(
            trained=len(due) - len(failed),
            there=len(works) - len(due),
            failed=tuple((by_key[key], reason) for key, reason in failed.items()),
            notes=tuple((by_key[key], text) for key, text in notes.items()),
            warnings=tuple(warnings),
        )

    def _due(self, works: Sequence[Work]) -> list[TileTask]:
        known, done = ledger_of(self.out).keys(), done_keys(self.out, works)
        return [
            TileTask(
                stage=STAGE,
                layer="",
                epoch=work.candidate.setting,
                tile=work.key,
                key=work.judged_key,
                suspect=work.key in known,
            )
            for work in works
            if work.key not in done
        ]

    def _profile(self) -> Profile:
        """Profile of the workers; nothing is overdue: a training takes what it takes."""
        found = self.config.profile(self.profile)
        require_runnable(found.runner, f"Profile {found.name!r}")
        if found.runner == "threads" and found.workers > 1:
            # torch's random numbers and threads are the process's: two trainings in one would wait for each other
            worker = found.worker
            found = load_profile(
                "dask-local", workers=found.workers, threads_per_worker=worker.cpus, mem_gb=worker.mem_gb
            )
        return replace(found, deadline_min=None)

    def _on_workers(
        self, works: Sequence[Work], due: list[TileTask], lock: Lock
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Train; returns the reasons of what failed and the notes on what did not, by key."""
        profile = self._profile()
        context = TrainContext(
            config=self.config,
            out=self.out,
            works={work.key: work for work in works},
            threads=profile.worker.cpus,
            lock=self.out / "locks" / lock.path.name,
            token=lock.token,
            open=self.open,
            tell=self._line if len(works) == 1 and profile.runner == "threads" else None,
        )
        failed, notes = dict[str, str](), dict[str, str]()
        with open_runner(profile) as runner:
            lock.set_running(min(len(due), profile.workers))
            lock.set_dashboard(runner.address)
            for result in self._results(runner, context, due):
                if result.status == "failed":
                    failed[result.task.tile] = result.reason
                    _recorded_failure(context, result)
                elif result.reason:
                    notes[result.task.tile] = result.reason
        return failed, notes

    def _results(self, runner: Runner, context: TrainContext, due: list[TileTask]) -> Iterable[TaskResult]:
        """Results as they come. Raises IncompleteError when nothing works, or nobody is left to work."""
        budget = self.config.tables.cluster.failure_budget
        work = runner.run(partial(train_task, context), due, hopeless=max(HOPELESS, budget + 1))
        bar = (
            None
            if self.say is None or context.tell
            else progress(self.say, desc=STAGE, unit="training", total=len(due))
        )
        try:
            with closing(work) as results:
                for result in results:
                    yield result
                    if bar is not None:
                        bar.update()
        except KeyboardInterrupt:  # a training may take hours
            runner.leave()
            raise
        except ClusterError as error:
            said = str(error).replace("tiles", "trainings")
            raise IncompleteError(f"{said}; what is done stays done") from None

    def _line(self, text: str) -> None:
        if self.say is not None:
            print(text, file=self.say, flush=True)


def _recorded_failure(context: TrainContext, result: TaskResult) -> None:
    """Record a training that ended its workers: they could not."""
    if result.fault not in GIVEN_UP:
        return
    context.require()
    record = Record(
        tile=result.task.tile,
        key=result.task.key,
        state="failed",
        reason=result.reason.replace("this tile", "this training"),
        fault=result.fault or "",
    )
    ledger_of(context.out).write(record)


def _by_setting(done: Sequence[Standing]) -> list[list[Standing]]:
    settings = dict.fromkeys(one.work.candidate.setting for one in done)
    return [[one for one in done if one.work.candidate.setting == setting] for setting in settings]

"""What is to be learnt: a queue that one thread works off, kept in a file, so that a killed studio goes on.

Things that wait and can be learnt together are made one fleet. A run is the commands' own: what a person stops here
goes on by the command, and the other way round.
"""

import dataclasses
import fcntl
import json
import re
import threading
from collections.abc import Callable, Sequence
from logging import WARNING, LogRecord
from logging import Handler as StandardHandler
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from perfusion_jax.config import KEYS, OVERRIDES, is_fleet, make_config, settle, to_json
from perfusion_jax.data.table import PER_CONCEPT, read_table
from perfusion_jax.learning.progress import Bar, Progress
from perfusion_jax.learning.report import Report
from perfusion_jax.learning.runs import Session, train_fleet, train_one
from perfusion_jax.learning.workdir import CHECKPOINTS, CONFIG, LOCK, REPORT, concept_file, has_results
from perfusion_jax.runtime.errors import InputError, Stopped
from perfusion_jax.runtime.files import read_text, storage_errors, write_bytes
from perfusion_jax.runtime.names import STUDIO
from perfusion_jax.web.faults import message_of
from perfusion_jax.web.library import TABLE, delete_run

THREAD = "learning"
WAITING, LEARNING, STOPPED, FAILED, DONE = "waiting", "learning", "stopped", "failed", "done"
MOST_STARTS = 2  # of a run that ends with the whole program each time, as where memory does not suffice
_OF_ANOTHER_VERSION = "it was put here by another version: take it out"
_ENDS_ALL = (
    f"the studio ended {MOST_STARTS} times while this was learnt, and it came no further: perhaps memory does not "
    "suffice. Go on tries it again; with a smaller batch_size, under Settings, it needs less"
)
# Keys in which the members of a fleet may differ.
_OWN = (*PER_CONCEPT, *OVERRIDES)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is to be learnt.

    Attributes:
        run: its workdir's name among the runs.
        names: of its concepts.
        kinds: their super-categories.
        config: as JSON.
        state: WAITING, LEARNING, STOPPED, FAILED or DONE.
        error: why it failed, or was stopped by the studio.
        warnings: of the last time that it was learnt.
        starts: how often it was begun from `mark` and ended with the whole program.
        mark: how far it had come when it was begun.
    """

    run: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    config: dict[str, Any]
    state: str = WAITING
    error: str = ""
    warnings: tuple[str, ...] = ()
    starts: int = 0
    mark: str = ""

    @property
    def is_of_this_version(self) -> bool:
        """Whether its config has the keys of this version, without which it can be neither learnt nor told as a
        command.
        """
        return isinstance(self.config, dict) and self.config.keys() == KEYS.keys()

    @property
    def settings(self) -> ConfigDict:
        """The config of the run, its lists as tuples again."""
        return ConfigDict(
            {key: tuple(value) if isinstance(value, list) else value for key, value in self.config.items()}
        )


class _Watched(Bar):
    """A bar on the studio's terminal that the page looks at as well."""

    def __init__(self, watch: Callable[[Bar], None], *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        watch(self)


class _Kept(StandardHandler):
    """Keeps what the thread that learns warns of, for the page."""

    def __init__(self, jobs: "Jobs"):
        super().__init__(WARNING)
        self._jobs = jobs

    def emit(self, record: LogRecord) -> None:
        """Keeps it."""
        if record.threadName == THREAD or (record.threadName or "").startswith("prepare"):
            self._jobs.warnings.append(record.getMessage())


class Jobs:
    """The queue, and the thread that learns.

    Args:
        runs: the studio's folder.
    """

    def __init__(self, runs: Path):
        self.runs = runs
        self._file = runs / STUDIO / "queue.json"
        self._changed = threading.Condition(threading.RLock())
        self._jobs = self._read()
        self._stop = threading.Event()
        self._closing = False
        self._bar: Bar | None = None
        self.warnings: list[str] = []  # of the run that is being learnt, or was the last
        self._kept = _Kept(self)
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    def start(self) -> None:
        """Begins to learn what waits."""
        logging.get_absl_logger().addHandler(self._kept)
        self._thread.start()

    def close(self) -> None:
        """Saves what is being learnt, to go on when the studio starts again."""
        logging.get_absl_logger().removeHandler(self._kept)
        with self._changed:
            self._closing = True
            self._stop.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_stopping(self) -> bool:
        """Whether the run that is being learnt was told to stop."""
        return self._stop.is_set()

    def snapshot(self) -> list[Job]:
        """All jobs, in the order in which they are learnt."""
        with self._changed:
            return list(self._jobs)

    def progress(self) -> Progress | None:
        """How far the run that is being learnt has come; None between runs."""
        bar = self._bar
        return None if bar is None else bar.read()

    def add(self, config: ConfigDict) -> Job:
        """Puts a concept at the end of the queue.

        Raises:
            InputError: there is a run of its name.
        """
        with self._changed:
            self.check_free(config.name)
            job = Job(config.name, (config.name,), (config.super_category,), json.loads(to_json(config)))
            self._append(job)
            return job

    def check_free(self, name: str) -> None:
        """Sees that a name can be taken.

        Raises:
            InputError: there is a run of it, or it waits for its turn.
        """
        # Nor one that differs by capitals alone, which some file systems take for the same.
        taken = {folder.name.casefold() for folder in self.runs.iterdir()}
        taken |= {each.casefold() for job in self._unfinished() for each in job.names}
        if name.casefold() in taken:
            raise InputError(f"there is a run called {name} already: take another name")

    def adopt(self, run: str) -> Job:
        """Goes on with a run that a command has begun.

        Args:
            run: one of those that `interrupted` names.

        Raises:
            InputError: it is none of them, or its config cannot be read.
        """
        self.check_interrupted(run)
        file = self.runs / run / CONFIG
        try:
            config = json.loads(read_text(epath.Path(file)))
            known = {key: config[key] for key in KEYS}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{file}: not the config of a run of this version ({error!r})") from error
        job = Job(run, (known["name"],), (known["super_category"],), known)
        if known["concepts"]:
            job = dataclasses.replace(job, names=(known["concepts"],), kinds=("",))
        with self._changed:
            if any(each.run == run for each in self._unfinished()):
                raise InputError(f"{run} is in the queue already")
            self._append(job)
        return job

    def interrupted(self) -> list[str]:
        """Runs that have learnt something, have not come to their end, and are neither in the queue nor at work."""
        queued = {job.run for job in self.snapshot() if job.state != DONE}
        found = []
        for file in sorted(self.runs.glob(f"*/{CONFIG}")):
            workdir = file.parent
            if workdir.name in queued or workdir.name.startswith("."):
                continue
            try:
                begun = has_results(epath.Path(workdir)) and not _has_ended(workdir, json.loads(file.read_text()))
                if begun and not is_at_work(workdir):
                    found.append(workdir.name)
            except (InputError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
                continue  # damaged, or not a run of ours: the command tells more of it
        return found

    def discard(self, run: str, photographs: bool = False) -> None:
        """Deletes a run that has not come to its end, with all that it has learnt.

        Args:
            run: one of those that `interrupted` names.
            photographs: whether its pictures go too, if the studio keeps them.

        Raises:
            InputError: it is none of them, or a job is at work in it.
        """
        self.check_interrupted(run)
        delete_run(self.runs / run, photographs)
        self.forget_deleted(run)

    def check_interrupted(self, run: str) -> None:
        """Sees that a run is one of those that `interrupted` names.

        Raises:
            InputError: it is not.
        """
        if run not in self.interrupted():
            raise InputError(f"{run}: no run that can be gone on with")

    def stop(self, run: str) -> None:
        """Stops a run, which saves first; or takes one that waits out of the line."""
        with self._changed:
            job = self._find(run)
            if job.state == LEARNING:
                self._stop.set()
            elif job.state == WAITING:
                self._put(job, state=STOPPED)

    def go_on(self, run: str) -> None:
        """Lets a run that was stopped, or has failed, wait for its turn again."""
        with self._changed:
            job = self._find(run)
            if not job.is_of_this_version:
                raise InputError(f"{run}: {_OF_ANOTHER_VERSION}")
            if job.state in (STOPPED, FAILED):
                self._put(job, state=WAITING, error="", warnings=(), starts=0)
                self._changed.notify_all()

    def forget(self, run: str) -> None:
        """Takes a run out of the queue; what it has learnt stays in its workdir, which goes if that is nothing.

        Raises:
            InputError: it is being learnt.
        """
        with self._changed:
            finished = [job for job in self._jobs if job.run == run and job.state == DONE]
            job = finished[0] if finished else self._find(run)
            if job.state == LEARNING:
                raise InputError(f"{run} is being learnt: stop it first")
            if not finished and not has_results(epath.Path(self.runs / run)):
                delete_run(self.runs / run)  # its name is free again
            self._jobs.remove(job)
            self._keep()

    def forget_deleted(self, run: str) -> None:
        """Takes a run that was deleted out of the queue, however often it is there: nothing begins it anew."""
        with self._changed:
            self._jobs = [job for job in self._jobs if job.run != run or job.state == LEARNING]
            self._keep()

    def rename(self, run: str, before: str, name: str) -> None:
        """Has the jobs of a run know that a concept has another name, so that they go on with it."""
        with self._changed:
            for job in [each for each in self._jobs if each.run == run and each.is_of_this_version]:
                names = tuple(name if each == before else each for each in job.names)
                alone = not job.config["concepts"]  # a table has its own names, which the run's report knows
                self._put(job, names=names, config={**job.config, "name": name} if alone else job.config)

    def _append(self, job: Job) -> None:
        """Puts a job at the end; the lock must be held."""
        self._jobs.append(job)
        try:
            self._keep()
        except InputError:
            self._jobs.remove(job)
            raise

    def _find(self, run: str) -> Job:
        for job in self._unfinished():
            if job.run == run:
                return job
        raise InputError(f"{run}: no such run in the queue; it may have come to its end meanwhile")

    def _unfinished(self) -> list[Job]:
        return [job for job in self._jobs if job.state != DONE]

    def _put(self, job: Job, **changes: Any) -> Job:
        """Replaces a job; the lock must be held."""
        changed = dataclasses.replace(job, **changes)
        self._jobs[self._jobs.index(job)] = changed
        try:
            self._keep()
        except InputError as error:  # the queue goes on as it is; a studio that is started again has an older one
            logging.error("%s", error)
        return changed

    def _read(self) -> list[Job]:
        text = read_text(epath.Path(self._file))
        try:
            jobs = [
                Job(**{**each, **{name: tuple(each.get(name, ())) for name in ("names", "kinds", "warnings")}})
                for each in json.loads(text or "[]")
            ]
        except (AttributeError, json.JSONDecodeError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{self._file}: damaged ({error!r}); delete it: the runs themselves stay") from error
        found = []
        for job in jobs:
            if not job.is_of_this_version:
                job = dataclasses.replace(job, state=FAILED, error=_OF_ANOTHER_VERSION)
            elif job.state == LEARNING:  # when the studio was killed
                if job.mark != _mark(self.runs / job.run):  # it has come further
                    job = dataclasses.replace(job, starts=0)
                ends_all = job.starts >= MOST_STARTS
                job = dataclasses.replace(
                    job, state=STOPPED if ends_all else WAITING, error=_ENDS_ALL if ends_all else ""
                )
            found.append(job)
        return found

    def _keep(self) -> None:
        self._changed.notify_all()
        write_bytes(self._file, json.dumps([dataclasses.asdict(job) for job in self._jobs], indent=1).encode())

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or any(job.state == WAITING for job in self._jobs))
                if self._closing:
                    return
                self._stop.clear()
                self.warnings = []
                try:
                    following = self._next()
                    mark = _mark(self.runs / following.run)
                    job = self._put(following, state=LEARNING, mark=mark, starts=following.starts + 1)
                except Exception as error:  # such as a fleet that cannot be written; the next must be learnt
                    waiting = next(job for job in self._jobs if job.state == WAITING)
                    self._put(waiting, state=FAILED, error=message_of(error))
                    continue
            state, problem = self._learn(job)
            with self._changed:
                self._bar = None
                if state == STOPPED and self._closing:
                    state = LEARNING  # goes on when the studio starts again
                self._put(job, state=state, error=problem, warnings=tuple(dict.fromkeys(self.warnings)), starts=0)

    def _next(self) -> Job:
        """The first that waits, as a fleet with all others that can be learnt with it; the lock must be held."""
        waiting = [job for job in self._jobs if job.state == WAITING]
        first = waiting[0]
        together = [
            job for job in waiting if _together(first, job) and not has_results(epath.Path(self.runs / job.run))
        ]
        if first not in together or len(together) < 2:
            return first
        run = f"{first.run}-and-{len(together) - 1}-more"
        while any(folder.name.casefold() == run.casefold() for folder in self.runs.iterdir()):
            run += "-again"
        fleet = make_fleet(self.runs / run, together)
        self._jobs = [fleet if job is first else job for job in self._jobs if job is first or job not in together]
        return fleet

    def _learn(self, job: Job) -> tuple[str, str]:
        """Learns a run; returns its state after that, and what went wrong."""

        def watch(bar: Bar) -> None:
            self._bar = bar

        session = Session(
            stop=self._stop.is_set, bar=lambda *arguments, **options: _Watched(watch, *arguments, **options)
        )
        workdir = epath.Path(self.runs / job.run)
        try:
            config = job.settings
            if is_fleet(config):
                train_fleet(config, workdir, session=session)
                return _outcome(Report(workdir / REPORT))
            train_one(config, workdir, session)
        except Stopped:
            return STOPPED, ""
        except Exception as error:  # the page must tell of it, and the next run be learnt
            return FAILED, message_of(error, "give a smaller batch_size, under Settings")
        return DONE, ""


def _mark(workdir: Path) -> str:
    """How far a run has come: another text as soon as it would go on from a later place."""
    steps = [int(folder.name) for folder in (workdir / CHECKPOINTS).glob("*") if folder.name.isdecimal()]
    report = workdir / REPORT
    return f"{max(steps, default=0)} {report.stat().st_size if report.exists() else 0}"


def is_at_work(workdir: Path) -> bool:
    """Whether a job holds a run's lock, looked up where nothing need be held: a command may start at this moment."""
    file = workdir / LOCK
    if not file.exists():
        return False
    try:
        held = Path("/proc/locks").read_text()
    except OSError:  # no Linux
        with file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return isinstance(error, BlockingIOError)
        return False
    return re.search(rf" FLOCK .*:{file.stat().st_ino} ", held) is not None


def _outcome(report: Report) -> tuple[str, str]:
    """The state of a fleet that has come to its end, and what went wrong with those that were not learnt."""
    wrong = [f"{name}: {line['error']}" for name, line in report.lines.items() if line["state"] != "done"]
    return (FAILED if wrong else DONE), "\n".join(wrong)


def _has_ended(workdir: Path, config: dict[str, Any]) -> bool:
    if not config["concepts"]:
        return concept_file(epath.Path(workdir), config["name"]).exists()
    report = Report(epath.Path(workdir / REPORT))
    return all(report.is_over(row.name) for row in read_table(config["concepts"], OVERRIDES))


def _together(one: Job, other: Job) -> bool:
    """Whether two single concepts can be members of one fleet."""
    if one.config["concepts"] or other.config["concepts"]:
        return False
    return all(one.config[key] == other.config[key] for key in KEYS if key not in _OWN)


def make_fleet(workdir: Path, jobs: Sequence[Job]) -> Job:
    """One run of several concepts, its table written into its workdir.

    Raises:
        InputError, UnavailableError: it cannot be written.
    """
    shared = jobs[0].config
    default = make_config(shared["base"])
    rows = [
        {
            **{key: job.config[key] for key in PER_CONCEPT},
            **{key: job.config[key] for key in OVERRIDES if job.config[key] != shared[key]},
        }
        for job in jobs
    ]
    table = workdir / TABLE
    with storage_errors(table, "written"):
        workdir.mkdir(parents=True)
    write_bytes(table, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    config = {**shared, "concepts": str(table), **{key: default[key] for key in PER_CONCEPT}}
    names, kinds = (tuple(getattr(job, field)[0] for job in jobs) for field in ("names", "kinds"))
    return Job(workdir.name, names, kinds, config)


def command_of(job: Job, runs: Path) -> list[str]:
    """The words of the command that learns a run, or goes on with it; none for one of another version."""
    if not job.is_of_this_version:
        return []
    given = {key: value for key, value in job.settings.items() if value != make_config()[key]}
    # The command gives what its base and its method would take otherwise.
    taken = settle(ConfigDict({**make_config(), **given}), given)
    given |= {key: value for key, value in job.settings.items() if value != taken[key]}
    options = [f"--config.{key}={given[key]}" for key in job.config if key in given]
    return ["python", "-m", "perfusion_jax.train", "--workdir", str(runs / job.run), *options]

"""Where a run writes what it learns: concepts and pictures in its workdir, progress in the folder of its job."""

import dataclasses
import json
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from etils import epath

from perfusion_jax.data.table import Row
from perfusion_jax.learning.report import OpenRound, Report
from perfusion_jax.learning.rounds import Member, Round, rounded_up
from perfusion_jax.learning.workdir import CHECKPOINTS, EXPORTS, FINISHED, OPEN_ROUND, SAMPLES, Log, concept_file
from perfusion_jax.pod import distributed
from perfusion_jax.runtime.files import read_text, storage_errors, write_bytes


def report_line(row: Row, state: str, **facts: Any) -> dict[str, Any]:
    """A concept's line of the report (`learning.runs`)."""
    line = {"name": row.name, "state": state, "steps": 0, "seconds": 0.0, "chip_seconds": 0.0, "error": ""}
    return line | {"row": row.digest} | facts


@dataclasses.dataclass(frozen=True)
class Records:
    """The files of a run.

    Attributes:
        workdir: where concepts and pictures go; the jobs of a fleet that was split share it.
        folder: of this job: checkpoints, logs, and which round is open.
        report: a line for each concept of a fleet; None for a run of one concept.
    """

    workdir: epath.Path
    folder: epath.Path
    report: Report | None

    @property
    def alone(self) -> bool:
        """Whether the run is of one concept."""
        return self.report is None

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of checkpoints."""
        return self.folder / CHECKPOINTS

    def concept(self, member: Member) -> epath.Path:
        """The file of a concept."""
        return concept_file(self.workdir, member.name)

    def export(self, member: Member, kind: str) -> epath.Path:
        """The folder of a concept's export."""
        return self.workdir / EXPORTS / member.name / kind

    def sheet(self, member: Member, step: int | None = None) -> epath.Path:
        """The file of a concept's pictures, after a step or when it is finished."""
        folder = self.workdir / SAMPLES
        if step is None:
            return folder / f"{member.name}.png"
        return (folder if self.alone else folder / member.name) / f"step_{step:06d}.png"

    def read_open_round(self) -> OpenRound:
        """The round that was interrupted; a run of one concept has no rounds."""
        return OpenRound() if self.alone else OpenRound.read(self._open)

    def open_round(self, current: Round, pictures: int) -> OpenRound:
        """Opens a round, or goes on with it if it is the one that was interrupted; all processes must call it.

        Args:
            current: the round.
            pictures: the most that one of this process's concepts has.

        Returns:
            What is kept of it. Checkpoints of another round are deleted.
        """
        opened = self.read_open_round()
        # Concepts of this round that were finished before it was interrupted, or that failed, have no slot now.
        goes_on = self.alone or (
            len(opened.members) == len(current.members)
            and all(a == b for a, b in zip(current.identities, opened.members, strict=True) if a)
        )
        if not goes_on:
            opened = OpenRound(steps_before=opened.steps_before)
        most = max(opened.pictures, *distributed.gather(pictures))
        # Who has lost its slot stands still from here on, and so must not come back to it.
        opened = dataclasses.replace(opened, members=current.identities, pictures=rounded_up(most))
        if distributed.is_first() and not goes_on:
            with storage_errors(self.checkpoints, "deleted"):
                self.checkpoints.rmtree(missing_ok=True)
        self.keep(opened)
        distributed.wait_for_all("round")
        return opened

    def keep(self, opened: OpenRound) -> None:
        """Keeps how far the open round has come; a run of one concept has no rounds."""
        if not self.alone:
            opened.write(self._open)

    def log(self, step: int) -> AbstractContextManager[Log | None]:
        """Opens metrics.jsonl and TensorBoard's events, to go on after a step; of many processes the first does."""
        return closing(Log(self.folder, step)) if distributed.is_first() else nullcontext()

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines to the report; a run of one concept keeps its only line apart.

        Raises:
            InputError, UnavailableError: it cannot be written.
        """
        if self.report is not None:
            self.report.add(lines)
        elif lines:
            write_bytes(self.folder / FINISHED, json.dumps(lines[-1]).encode())

    def is_finished(self, member: Member) -> bool:
        """Whether the only concept of a run has come to its end, and all that its config asks for is written.

        Raises:
            InputError, UnavailableError: storage fails.
        """
        try:
            line = json.loads(read_text(self.folder / FINISHED) or "{}")
        except json.JSONDecodeError:  # the end is done again
            return False
        with storage_errors(self.concept(member), "read"):
            written = self.concept(member).exists() and set(member.config.exports) <= set(line.get("exports", ()))
        return written and line.get("steps", -1) >= member.config.steps

    def over(self, current: Round) -> set[int]:
        """The slots of a round whose concepts are done with, as the report says."""
        if self.report is None:
            return set()
        return {slot for slot, member in enumerate(current.members) if member and self.report.is_over(member.name)}

    @property
    def _open(self) -> epath.Path:
        return self.folder / OPEN_ROUND

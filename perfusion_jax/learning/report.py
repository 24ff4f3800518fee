"""What a fleet keeps of its progress: a line per concept, and which round is open."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from perfusion_jax.pod import distributed
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import read_text, write_bytes

OVER = ("done", "diverged")  # not tried again


class Report:
    """report.jsonl, rewritten as a whole each time, so that it is never cut off.

    Args:
        file: where; the first process reads and writes it.

    Raises:
        InputError: it is damaged, or cannot be read.
        UnavailableError: it cannot be read for now.
    """

    def __init__(self, file: epath.Path):
        self.file = file
        text = distributed.from_first(lambda: read_text(file))
        try:
            lines = map(json.loads, text.splitlines())
            self.lines: dict[str, dict[str, Any]] = {line["name"]: line for line in lines}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{file}: damaged ({error!r}); delete it to learn all concepts anew") from error

    def is_over(self, name: str) -> bool:
        """Whether a concept is done with."""
        return name in self.lines and self.lines[name]["state"] in OVER

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds concepts, or replaces their lines.

        Raises:
            InputError, UnavailableError: it cannot be written.
        """
        if not lines:
            return
        self.lines |= {line["name"]: line for line in lines}
        if distributed.is_first():
            write_bytes(self.file, "".join(f"{json.dumps(line)}\n" for line in self.lines.values()).encode())


@dataclasses.dataclass
class OpenRound:
    """The round that is being learnt, so that an interrupted one is gone on with.

    Attributes:
        members: the concepts by slot (`Member.identity`); none: no round is open.
        steps_before: steps that all rounds before it took.
        seconds: that it has taken already.
        chip_seconds: of each concept that is not finished.
        pictures: that each concept's are padded to.
    """

    members: list[str | None] = dataclasses.field(default_factory=list)
    steps_before: int = 0
    seconds: float = 0.0
    chip_seconds: float = 0.0
    pictures: int = 0

    @classmethod
    def read(cls, file: epath.Path) -> "OpenRound":
        """Reads what `write` wrote; of many processes the first does.

        Raises:
            InputError: it is damaged, or cannot be read.
            UnavailableError: it cannot be read for now.
        """
        text = distributed.from_first(lambda: read_text(file))
        try:
            return cls(**json.loads(text)) if text else cls()
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"{file}: damaged ({error}); delete it to begin the round anew") from error

    def write(self, file: epath.Path) -> None:
        """Writes it; of many processes the first does.

        Raises:
            InputError, UnavailableError: it cannot be written.
        """
        if distributed.is_first():
            write_bytes(file, json.dumps(dataclasses.asdict(self)).encode())

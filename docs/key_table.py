"""Writes the table of all config keys into docs/training.md: `python docs/key_table.py`.

The table stands between the marks `<!-- keys -->` and `<!-- /keys -->`; tests/test_docs.py checks it.
"""

import re
from pathlib import Path
from typing import Any

from perfusion_jax.config import KEYS

DOCUMENT = Path(__file__).with_name("training.md")
MARKED = re.compile(r"(?<=<!-- keys -->\n).*?(?=<!-- /keys -->)", re.DOTALL)


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([*_<>|])", r"\\\1", text)


def shown(default: Any) -> str:
    """A default as the table shows it."""
    if isinstance(default, tuple) and default:
        return f"{len(default)} prompts, from `{default[0]}` to `{default[-1]}`"
    return f"`{default!r}`"


def key_table() -> str:
    """The table, a row for each key."""
    rows = [
        (
            f"`{name}`",
            shown(key.default),
            plain(key.rule.wanted.replace("at least -inf", "any number")),
            plain(key.meaning),
            key.may_change,
            key.in_tables,
        )
        for name, key in KEYS.items()
    ]
    lines = [
        f"| {' | '.join(texts)} | {'yes' if may_change else ''} | {'yes' if in_tables else ''} |"
        for *texts, may_change, in_tables in rows
    ]
    head = ["| key | default | possible | meaning | resume | table |", "| --- | --- | --- | --- | --- | --- |"]
    return "".join(f"{line}\n" for line in [*head, *lines])


if __name__ == "__main__":
    DOCUMENT.write_text(MARKED.sub(lambda _: key_table(), DOCUMENT.read_text()))

"""The documents of the repository, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md", "pretraining/README.md")
DOCUMENTS = [README, *DOCS, *(ROOT / name for name in OTHERS)]

_COMMAND = re.compile(r"python (?:-m ((?:perfusion_jax|pretraining)[\w.]*)|(benchmarks/\w+\.py))([^\n`|&]*)")
_ABSL = re.compile(r'DEFINE_\w+\(\s*"(\w+)"')
_ARGPARSE = re.compile(r'add_argument\("--(\w+)"')


def joined(file: Path) -> str:
    """A document's text, with commands that go over several lines as one."""
    return file.read_text().replace("\\\n", " ")


def python_blocks(file: Path) -> list[str]:
    """Python of a document, block by block."""
    return re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)


def commands(file: Path) -> list[tuple[Path, list[str]]]:
    """The commands of this repository in a document: the program's file, and the flags that it is given."""
    found = []
    for module, script, arguments in _COMMAND.findall(joined(file)):
        program = ROOT / (script or f"{module.rstrip('.').replace('.', '/')}.py")
        found.append((program, re.findall(r"--([\w.]+)", arguments)))
    return found


def flags_of(program: Path) -> set[str]:
    """The flags that a program defines, and those of the module that benchmarks beside PyTorch share."""
    text = program.read_text()
    if "from side_by_side import" in text:
        text += (ROOT / "benchmarks" / "side_by_side.py").read_text()
    return {*_ABSL.findall(text), *_ARGPARSE.findall(text)}

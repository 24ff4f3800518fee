"""What the documents say is there and named so: files, headings, flags, keys; and the README is short."""

import re
import runpy

import pytest
import yaml
from documents import DOCS, DOCUMENTS, README, ROOT, commands, flags_of, joined

from perfusion_jax.config import KEYS, OVERRIDES

MOST_WORDS = 700
OURS = ("perfusion_jax", "pretraining", "configs", "launch", "benchmarks", "docs", "tests")

each_document = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


def prose(file):
    """A document without what stands in fences."""
    return re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)


def anchors(file):
    """What the headings of a document are called in links to them, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= MOST_WORDS


def test_the_test_command_is_marked_and_deletes_nothing():
    marked = re.search(r"<!-- tests -->\n```sh\n(.*?)```\n<!-- /tests -->", README.read_text(), re.DOTALL)
    assert marked
    assert marked[1].startswith("python3 -m venv .venv\n")
    assert marked[1].rstrip().endswith(".venv/bin/python -m pytest -n 2 --dist loadfile")
    assert "--clear" not in README.read_text()


@each_document
def test_links_lead_somewhere(file):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_paths_that_are_named_are_there(file):
    if file.name == "CHANGELOG.md":  # it names what is gone as well
        return
    for path in re.findall(rf"(?<![\w/.])((?:{'|'.join(OURS)})/[\w./-]*\w)", file.read_text()):
        assert (ROOT / path).exists() or (file.parent / path).exists(), path


@each_document
def test_commands_are_of_programs_and_flags_that_are_there(file):
    for program, given in commands(file):
        assert program.is_file(), program
        keys = {f"config.{key}" for key in (*KEYS, "KEY")}
        unknown = set(given) - flags_of(program) - keys - {"help"}
        assert not unknown, f"{program.name}: {unknown}"


@each_document
def test_keys_that_are_named_are_keys(file):
    assert set(re.findall(r"--config\.(\w+)", joined(file))) <= {*KEYS, "KEY"}
    named = set(re.findall(r"`config\.([a-z_]+)[`=]", joined(file)))
    assert named - {"json", "py"} <= set(KEYS)


@each_document
def test_names_beside_files_are_in_them(file):
    for names, path in re.findall(r"`([A-Za-z_.]+)` in\s+\[[^\]]*\]\(([^)]+\.py)\)", prose(file)):
        code = (file.parent / path).read_text()
        for name in names.split("."):
            assert re.search(rf"\b(?:def|class) {name}\b|^ *{name}\b.*[:=]", code, re.MULTILINE), (names, path)


def test_the_columns_of_a_table_are_named():
    text = (ROOT / "docs" / "fleets.md").read_text()
    (named,) = re.findall(r"may differ in (.*?) are learnt in rounds of their own", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", named)) == set(OVERRIDES)


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [file.name for file in DOCS if file.name != "index.md" and f"({file.name})" not in index] == []


def test_the_table_of_keys_is_that_of_the_config():
    script = runpy.run_path(str(ROOT / "docs" / "key_table.py"))
    (table,) = script["MARKED"].findall((ROOT / "docs" / "training.md").read_text())
    assert table == script["key_table"](), "write it anew: python docs/key_table.py"
    assert all(f"\n| `{name}` |" in table for name in KEYS)


@pytest.mark.parametrize(("command", "document"), [("sample", "drawing"), ("train", "training")])
def test_every_flag_has_a_row(command, document):
    rows = [line for line in (ROOT / "docs" / f"{document}.md").read_text().splitlines() if line.startswith("| `--")]
    named = {flag for row in rows for flag in re.findall(r"`--(\w+)", row.split("|")[1])}
    assert named == flags_of(ROOT / "perfusion_jax" / f"{command}.py")


def test_pre_commit_runs_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {f".venv/bin/{hook['entry']}" for hook in hooks} == {
        line for line in ci if line.startswith((".venv/bin/ruff", ".venv/bin/mypy"))
    }


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Tewel", "Gal", "Chechik", "Atzmon"]
    assert (paper["year"], paper["doi"]) == (2023, "10.1145/3588432.3591506")

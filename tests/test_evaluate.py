"""The command that evaluates: on a small model, as its users run it."""

import base64
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from exported import learnt
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.evaluation.subjects import Base, Subject, base_of
from perfusion_jax.formats.concept_file import save_concept
from perfusion_jax.method import baselines
from perfusion_jax.runtime import shipped


@pytest.fixture(scope="module")
def concepts(small_base, small_folder, tmp_path_factory):
    """Two concepts and their pictures, given as a fleet leaves them in its workdir."""
    workdir = tmp_path_factory.mktemp("fleet")
    lines = ["name,super_category,pictures"]
    for number, name in enumerate(("rex", "tom")):
        (workdir / name).mkdir()
        pixels = np.random.default_rng(number).integers(0, 255, (2, 20, 24, 3), np.uint8)
        for place, picture in enumerate(pixels):
            Image.fromarray(picture).save(workdir / name / f"{place}.png")
        concept, card = learnt(small_base, name, "dog", seed=number)
        save_concept(workdir / "concepts" / f"{name}.safetensors", concept, card)
        lines.append(f"{name},dog,{name}")
    (workdir / "concepts.csv").write_text("\n".join(lines) + "\n")
    config = {"crop": True, "concepts": str(workdir / "concepts.csv"), "base": str(small_folder)}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "prompts.txt").write_text("a photo of a {}\na {} in the snow\n")
    return workdir


def evaluate(folder, concepts, *arguments, devices=1):
    command = [sys.executable, "-m", "perfusion_jax.evaluate", f"--evaluator={shipped.EVALUATOR}"]
    command += [f"--base={folder}"] if folder else []
    command += [f"--prompts={concepts / 'prompts.txt'}", "--num_images=2", "--steps=2", *map(str, arguments)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags})


class Pictures(HTMLParser):
    """The pictures that a page shows."""

    def __init__(self, page):
        super().__init__()
        self.shown = {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            facts = dict(attributes)
            kind, _, data = facts["src"].partition(",")
            assert kind == "data:image/webp;base64"
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                self.shown[facts["alt"]] = picture.size


def test_a_fleet_is_evaluated_and_goes_on(small_folder, concepts, tmp_path):
    given = (f"--workdir={concepts}", f"--out={tmp_path / 'out'}", "--sweep=bias=0.3:0.7:2")
    wrong = evaluate("emoji", concepts, *given)
    assert wrong.returncode == 2
    assert "give --base" in wrong.stderr
    # What failed stands in nothing's way, and the runs say their base model.
    done = evaluate(None, concepts, *given)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    files = [tmp_path / "out" / "scores" / f"{name}.jsonl" for name in ("rex", "tom")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [(line["name"], line["setting"]) for line in lines] == [
        (name, setting) for name in ("rex", "tom") for setting in ("bias 0.3", "bias 0.7")
    ]
    assert all(len(line[key]) == 4 for line in lines for key in ("image", "text", "precision"))
    for setting, row in report["fronts"]["all"]["settings"].items():
        means = [np.mean(line["image"]) for line in lines if line["setting"] == setting]
        assert row["image"]["mean"] == pytest.approx(np.mean(means))
        assert (row["image"]["low"], row["image"]["high"]) == (None, None)  # of two concepts
    page = (tmp_path / "out" / "report.html").read_text()
    shown = Pictures(page).shown
    assert len(shown) == 2 * (1 + 2)
    assert shown["pictures of rex"][1] >= 32
    with Image.open(tmp_path / "out/pictures/tom/bias_0.7.png") as picture:
        assert shown["tom, bias 0.7"] == picture.size
    assert "<svg" in page

    # What is there is not drawn again; what was lost is, to the same numbers.
    kept = files[1].read_text()
    files[1].write_text(kept.splitlines()[0] + "\n")
    before = (tmp_path / "out/pictures/rex/bias_0.3.png").stat().st_mtime_ns
    assert evaluate(small_folder, concepts, *given).returncode == 0
    assert files[1].read_text() == kept
    assert (tmp_path / "out/pictures/rex/bias_0.3.png").stat().st_mtime_ns == before

    other = evaluate(small_folder, concepts, *given[:2], "--seed=1")
    assert other.returncode == 2
    assert f"error: {tmp_path / 'out'}: holds another evaluation" in other.stderr


def test_a_report_of_somebody_elses_is_not_replaced(small_folder, concepts, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    failed = evaluate(small_folder, concepts, f"--workdir={concepts}", f"--out={tmp_path}")
    assert failed.returncode == 2
    assert f"error: {tmp_path / 'report.html'}: is there already, and is of no evaluation" in failed.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_runs_say_what_they_were_learnt_on():
    sd, xl = Base("sd", None, "fp16"), Base("xl", None, None)
    runs = [Subject(name, Path(name), "", base=base) for name, base in (("a", sd), ("b", sd), ("c", None))]
    said = SimpleNamespace(base=None, revision="main", variant=None)
    assert base_of(runs, said) == Base("sd", "main", "fp16")
    assert base_of(runs[2:], said) == Base("emoji", "main", None)
    assert base_of(runs, SimpleNamespace(base="xl", revision=None, variant=None)) == xl
    with pytest.raises(InputError, match="of several base models, sd, xl: evaluate them apart, or give --base"):
        base_of([*runs, runs[0]._replace(base=xl)], said)


@pytest.mark.slow
def test_methods_are_compared_over_their_runs_and_shards_share_the_work(small_folder, concepts, small_base, tmp_path):
    """Two runs by one method and one by another, of the same concepts."""
    others = tmp_path / "lora"
    shutil.copytree(concepts, others)
    embedding = small_base.super_category_embedding("dog")
    for name in ("rex", "tom"):
        word = baselines.begin("lora", small_base.params["unet"], embedding, jax.random.key(0))
        card = learnt(small_base, name, "dog")[1]
        save_concept(others / "concepts" / f"{name}.safetensors", word, dataclasses.replace(card, method="lora"))
    given = [f"--workdir=ours={concepts}", f"--workdir=ours={concepts}", f"--workdir=lora={others}"]
    given += ["--sweep=ours:bias=0.3:0.7:2", "--sweep=lora:strength=0.5:1:2", f"--out={tmp_path / 'out'}"]
    refused = evaluate(small_folder, concepts, *given[:3], "--sweep=bias=0.3:0.7:2", f"--out={tmp_path / 'out'}")
    assert refused.returncode == 2
    assert "--sweep: bias is of Perfusion's edit: rex was learnt by lora" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = evaluate(small_folder, concepts, *given, "--shard=1/2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 of 6 concepts are scored")
    drawn = {str(file.relative_to(tmp_path / "out/scores")) for file in (tmp_path / "out/scores").rglob("*.jsonl")}
    assert drawn == {"ours/tom.jsonl", "ours_2/tom.jsonl", "lora/tom.jsonl"}
    assert not (tmp_path / "out" / "report.json").exists()
    assert evaluate(small_folder, concepts, *given).returncode == 0
    fronts = json.loads((tmp_path / "out" / "report.json").read_text())["fronts"]
    assert {label: list(front["settings"]) for label, front in fronts.items()} == {
        "ours": ["bias 0.3", "bias 0.7"],
        "lora": ["strength 0.5", "strength 1"],
    }
    lines = [json.loads(line) for line in (tmp_path / "out/scores/ours_2/tom.jsonl").read_text().splitlines()]
    assert fronts["ours"]["concepts"]["bias 0.7"]["tom"]["text"] == pytest.approx(np.mean(lines[1]["text"]))
    areas = {label: front["dominated_area"]["mean"] for label, front in fronts.items()}
    assert fronts["ours"]["lead"] is None
    assert fronts["lora"]["lead"]["mean"] == pytest.approx(areas["lora"] - areas["ours"])
    shown = Pictures((tmp_path / "out" / "report.html").read_text()).shown
    assert len(shown) == 2 * (1 + 3 * 2)
    assert "rex, ours_2, bias 0.3" in shown
    assert (tmp_path / "out/pictures/ours_2/rex/bias_0.3.png").exists()


@pytest.mark.slow
def test_devices_share_the_drawing(small_folder, concepts, tmp_path):
    given = (f"--concept={concepts}/concepts/rex.safetensors", f"--pictures={concepts}/rex", "--batch_size=3")
    scores = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        done = evaluate(small_folder, concepts, *given, f"--out={out}", devices=devices)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads((out / "scores" / "rex.jsonl").read_text()))
    for key in ("image", "text", "precision"):
        np.testing.assert_allclose(*(line[key] for line in scores), atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to evaluate: give --workdir"),
        *(
            pytest.param(arguments, message, marks=pytest.mark.slow)
            for arguments, message in (
                (("--concept={}/concepts/rex.safetensors",), "--concept is given 1 times and --pictures 0 times"),
                (("--workdir={}", "--concept={}/concepts/rex.safetensors", "--pictures={}/rex"), "two concepts are"),
                (("--workdir={}/rex",), "no config.json in it"),
                (("--workdir=a={}", "--sweep=b:bias=0:1:2"), "no --workdir has the label b"),
                (("--workdir=a={}", "--sweep=bias=0:1:2", "--sweep=bias=0:1:3"), "what has no label is swept already"),
            )
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(small_folder, concepts, tmp_path, arguments, message):
    failed = evaluate(
        small_folder, concepts, f"--out={tmp_path}", *(argument.format(concepts) for argument in arguments)
    )
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.iterdir())


def test_prompts_without_a_place_for_the_name_are_refused(small_folder, concepts, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    failed = evaluate(
        small_folder, concepts, f"--out={tmp_path}", f"--workdir={concepts}", f"--prompts={tmp_path / 'prompts.txt'}"
    )
    assert failed.returncode == 2
    assert "'a dog' needs one {}, where the concept's name goes" in failed.stderr

"""The command line that draws."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from odd_names import ODD_NAMES
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.data.measuring import find_or_measure
from perfusion_jax.data.sources import count_pictures, read_pictures
from perfusion_jax.data.table import read_table
from perfusion_jax.drawing import arguments, rendering
from perfusion_jax.drawing import recipe as recipes
from perfusion_jax.drawing.attention_sheets import write_attention
from perfusion_jax.drawing.generation import Drawn
from perfusion_jax.drawing.rendering import init_pixels
from perfusion_jax.evaluation.subjects import of_workdirs
from perfusion_jax.formats.concept_file import ConceptCard, save_concept
from perfusion_jax.formats.covariance_file import load_covariance
from perfusion_jax.formats.picture_file import load_recipe, write_picture
from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import UnavailableError
from perfusion_jax.runtime.files import check_writable, to_path, write_bytes

ROOT = Path(__file__).parents[1]


def save(base, file, name, word="dog"):
    concept = base.new_concept(word, jnp.eye(base.model.context_width))
    card = ConceptCard(name, word, "small", base.fingerprint, 0.6, 0.15, guidance_scale=6.0, step=1)
    save_concept(file, concept, card)
    return file


@pytest.fixture
def rex(small_base, tmp_path):
    return save(small_base, tmp_path / "rex.safetensors", "rex")


@pytest.fixture
def recipe(small_folder, rex):
    """What `--concept rex --prompt "a <rex>" --num_images 2` asks for, small."""
    options = dict.fromkeys(recipes.OPTIONS)
    options |= {"sampler": "ddim", "steps": 2, "guidance_rescale": 0.0, "negative_prompt": "", "lock": "local"}
    options |= {"height": 32, "width": 32, "init_strength": 0.8, "batch_size": 2}
    return recipes.Recipe(
        base={"source": str(small_folder), "revision": None, "variant": None},
        concepts=arguments.read_concepts([str(rex)]),
        prompts=["a <rex>", "a <rex>"],
        seeds=[0, 1],
        columns=2,
        options=options,
        init_image=None,
        sweep=None,
        versions={"perfusion_jax": "0"},
    )


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture)


def run(*arguments):
    command = [sys.executable, "-m", "perfusion_jax.sample", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_draws_pictures_tells_how_and_draws_them_again(small_folder, rex, tmp_path):
    out = tmp_path / "new" / "rex.png"
    small = (f"--base={small_folder}", "--steps=2", "--spacing=trailing", "--height=32", "--width=32")
    done = run(
        f"--attention={tmp_path}/maps",
        *small,
        f"--concept={rex}",
        "--prompt=a photo of a <rex>",
        f"--out={out}",
        "--num_images=3",
        "--bias=0.5",
    )
    assert done.returncode == 0, done.stderr
    assert "warning: " not in done.stdout + done.stderr
    assert "4/4" not in done.stderr  # two steps of one batch
    assert "2/2" in done.stderr
    sheet = pixels(out)
    assert sheet.shape == (2 * 128 + 4, 2 * 128 + 4, 3)
    singles = [pixels(out.with_name(f"rex_{number}.png")) for number in range(3)]
    np.testing.assert_array_equal(sheet[132:, :128], singles[2].repeat(4, axis=0).repeat(4, axis=1))

    assert sorted(file.name for file in (tmp_path / "maps").iterdir()) == ["0.png", "1.png", "2.png"]

    done = run("--again", out.with_name("rex_2.png"), f"--base={small_folder}")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["prompts"], said["seeds"]) == (["a photo of a <rex>"], [2])
    assert said["options"]["bias"] == [0.5]
    assert said["concepts"][0]["file"] == str(rex)
    assert set(said["versions"]) == {"perfusion_jax", "jax", "flax", "diffusers"}
    done = run("--again", out.with_name("rex_2.png"), f"--base={small_folder}", "--out", tmp_path / "again.png")
    assert done.returncode == 0, done.stderr
    assert np.abs(pixels(tmp_path / "again.png").astype(int) - singles[2]).max() <= 1


def test_bad_words_are_one_line_and_nothing_is_drawn(small_folder, rex, tmp_path):
    done = run(
        f"--base={small_folder}", f"--concept={rex}", "--prompt=a <rex>", f"--out={tmp_path}/x.png", "--bias=1,2"
    )
    assert done.returncode != 0
    assert (
        done.stderr.strip().splitlines()[-1] == "error: bias has 2 values: give one, or one for each of the 1 concepts"
    )
    (tmp_path / "file").write_text("")
    done = run("--prompt=a dog", f"--out={tmp_path}/file/x.png")
    assert "file: cannot be written" in done.stderr.strip().splitlines()[-1]
    done = run(f"--base={small_folder}", f"--concept={rex}", f"--prompt={'dog ' * 20}", f"--out={tmp_path}/x.png")
    warning, error = done.stderr.strip().splitlines()[0], done.stderr.strip().splitlines()[-1]
    assert warning == "warning: no prompt names <rex>: the concept rex has no effect"
    assert "has 20 tokens" in error
    assert "step" not in done.stderr
    assert not done.stdout
    done = run("--again", tmp_path / "x.png", "--steps=3", "--concept=x", f"--out={tmp_path}/y.png")
    assert "error: --again draws as the picture says, without --concept, --steps: leave" in done.stderr
    done = run("--prompt=a dog")
    assert done.stderr.strip().splitlines()[-1] == "error: give --out, the .png file to write"


def test_a_sweep_is_a_labelled_grid(recipe, small_base, tmp_path):
    swept = recipe._replace(sweep=("bias", [0.4, 0.6, 0.8]))
    rendering.write(swept, rendering.draw(swept, small_base), tmp_path / "sweep.png")
    sheet = pixels(tmp_path / "sweep.png")
    assert sheet.shape == (20 + 2 * (20 + 128) + 4, 3 * 128 + 2 * 4, 3)
    assert (sheet[:20] < 128).any()  # words
    assert load_recipe(tmp_path / "sweep.png")["sweep"] == ["bias", [0.4, 0.6, 0.8]]
    assert arguments.parse_sweep("bias=0.4:0.8:5") == ("bias", [0.4, 0.5, 0.6, 0.7, 0.8])
    for wrong in ("bias", "bias=1:2", "height=1:2:3", "bias=a:b:2", "bias=0:1:0"):
        with pytest.raises(InputError, match="--sweep="):
            arguments.parse_sweep(wrong)


def test_prompts_of_a_file_have_a_row_each(recipe, small_base, tmp_path):
    (tmp_path / "prompts.txt").write_text("a <rex>\n\nthe <rex> on the beach\n")
    prompts = arguments.read_prompts(None, str(tmp_path / "prompts.txt"))
    assert prompts == ["a <rex>", "the <rex> on the beach"]
    both = recipe._replace(prompts=[prompt for prompt in prompts for _ in range(2)], seeds=[0, 1, 0, 1])
    rendering.write(both, rendering.draw(both, small_base), tmp_path / "both.png")
    assert pixels(tmp_path / "both.png").shape == (2 * (20 + 128) + 4, 2 * 128 + 4, 3)
    for prompt, file in ((None, None), ("a dog", "prompts.txt"), (None, str(tmp_path / "none.txt"))):
        with pytest.raises(InputError, match=r"give --prompt or --prompts|none.txt: cannot be read"):
            arguments.read_prompts(prompt, file)


def test_attention_shows_every_word(recipe, small_base, tmp_path):
    drawn = rendering.draw(recipe, small_base, attention=True)
    write_attention(recipe, drawn[0], small_base.model.tokenizer, tmp_path / "maps")
    for number in range(2):
        assert pixels(tmp_path / "maps" / f"{number}.png").shape == (20 + 128, 3 * 128 + 2 * 4, 3)  # picture, a, <rex>


def test_from_a_picture(recipe, small_base, tmp_path):
    write_picture(tmp_path / "init.png", np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8))
    start = recipe._replace(init_image=str(tmp_path / "init.png"))
    drawn = rendering.draw(start, small_base)[0][0].pixels
    assert np.abs(drawn.astype(int) - rendering.draw(recipe, small_base)[0][0].pixels).max() > 5
    with pytest.raises(InputError, match=r"none.png: no such picture"):
        rendering.draw(recipe._replace(init_image=str(tmp_path / "none.png")), small_base)


def test_concepts_by_name_twice_and_not_named(recipe, small_base, rex, tmp_path, capsys):
    assert len(arguments.read_concepts([str(rex), str(rex)])) == 1
    other = save(small_base, tmp_path / "other.safetensors", "rex", "cat")
    with pytest.raises(
        InputError, match="two concepts are called rex: give one another name, as in --concept other_rex="
    ):
        rendering.draw(recipe._replace(concepts=arguments.read_concepts([str(rex), str(other)])), small_base)
    both = recipe._replace(
        concepts=arguments.read_concepts([str(rex), f"tom={other}"]), prompts=["<rex> and <tom>"] * 2
    )
    rendering.draw(both, small_base)
    assert recipes.unnamed(both) == []
    capsys.readouterr()  # what drawing said
    arguments.warn(recipes.unnamed(recipe._replace(concepts=both.concepts)))
    said = capsys.readouterr()
    assert said.err == "warning: no prompt names <tom>: the concept tom has no effect\n"
    assert not said.out


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"prompts": ["a <rex>", "dog " * 20]}, {}, "has 20 tokens; this text encoder takes 14"),
        ({"sweep": ("end", [0.5, 1.5])}, {}, "end is 1.5"),
        ({}, {"negative_prompt": "dog " * 20}, "has 20 tokens; this text encoder takes 14"),
        ({}, {"bias": [0.5, 0.6]}, "bias has 2 values"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_bar_begins(recipe, small_base, capsys, change, options, message):
    asked = recipe._replace(**change, options={**recipe.options, **options})
    with pytest.raises(InputError, match=message):
        rendering.draw(asked, small_base)
    assert not "".join(capsys.readouterr())


def test_everything_may_lie_in_a_bucket(recipe, small_base, bucket, capsys):
    file = save(small_base, f"{bucket}/a=b/rex.safetensors", "rex")
    for word, name in ((file, "rex"), (f"tom={file}", "tom")):
        (entry,) = arguments.read_concepts([word])
        assert (entry["name"], entry["file"]) == (name, file)
    write_picture(f"{bucket}/init.png", np.zeros((32, 32, 3), np.uint8))
    write_bytes(f"{bucket}/prompts.txt", b"a <tom>")
    asked = recipe._replace(
        concepts=arguments.read_concepts([f"tom={file}"]),
        prompts=arguments.read_prompts(None, f"{bucket}/prompts.txt"),
        seeds=[0],
        init_image=f"{bucket}/init.png",
        versions={},
    )
    out, maps = to_path(f"{bucket}/new/out.png"), to_path(f"{bucket}/maps")
    for folder in (out.parent, maps):
        check_writable(folder)
    drawn = rendering.draw(asked, small_base, attention=True)
    rendering.write(asked, drawn, out)
    write_attention(asked, drawn[0], small_base.model.tokenizer, maps)
    assert [file.name for file in maps.iterdir()] == ["0.png"]
    found = arguments.recipe_of_picture(str(out), True, recipe.base["source"])
    assert (found.concepts, found.init_image) == (asked.concepts, asked.init_image)
    write_bytes(file, b"another")
    with pytest.raises(InputError, match=r"rex.safetensors: the concept has changed since gs://bucket/new/out.png"):
        arguments.recipe_of_picture(str(out), True, recipe.base["source"])


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(5, "Input/output error"), UnavailableError), (PermissionError(13, "no"), InputError)]
)
def test_storage_that_fails_is_named(recipe, small_base, rex, tmp_path, monkeypatch, error, kind):
    def fail(_):
        raise error

    picture = tmp_path / "picture.png"
    write_picture(picture, np.zeros((8, 8, 3), np.uint8), recipe._asdict())
    for method in ("read_bytes", "read_text"):
        monkeypatch.setattr(type(epath.Path(picture)), method, fail)
    for read, name in (
        (lambda: arguments.read_concepts([f"tom={rex}"]), "rex.safetensors"),
        (lambda: arguments.read_prompts(None, str(tmp_path / "prompts.txt")), "prompts.txt"),
        (lambda: arguments.recipe_of_picture(picture, True, "emoji"), "picture.png"),
        (lambda: init_pixels(recipe._replace(init_image=str(picture)), small_base), "picture.png"),
    ):
        with pytest.raises(InputError, match=f"{name}: cannot be read") as raised:
            read()
        assert type(raised.value) is kind


def test_addresses_of_no_storage_are_named(recipe, small_base):
    http = "http://host/x"
    assert count_pictures(http) == 0
    for read in (
        lambda: read_pictures(http),
        lambda: read_pictures(f"tfds:{http}#dog"),
        lambda: read_pictures(str(shipped.EXAMPLES / "dog"), masks=http),
        lambda: read_pictures(str(shipped.EXAMPLES / "dog"), captions=http),
        lambda: read_table(http, ()),
        lambda: load_covariance(http, 8),
        lambda: find_or_measure(small_base, http),
        lambda: of_workdirs([http]),
        lambda: of_workdirs([f"ours={http}"]),
        lambda: arguments.read_concepts([http]),
        lambda: arguments.read_concepts([f"tom={http}"]),
        lambda: arguments.read_prompts(None, http),
        lambda: arguments.recipe_of_picture(http, True, "emoji"),
        lambda: init_pixels(recipe._replace(init_image=http), small_base),
        lambda: write_picture(http, np.zeros((8, 8, 3), np.uint8)),
    ):
        with pytest.raises(InputError, match="http://host/x: http:// is no storage known here"):
            read()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_and_folders_may_have_any_name(recipe, small_base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for out in (to_path(f"{name}.png"), to_path(name) / "out.png"):
        check_writable(out.parent)
        rendering.write(recipe, [[Drawn(np.zeros((2, 8, 8, 3), np.uint8), None)]], out)
        assert load_recipe(out.with_stem(f"{out.stem}_1"))["seeds"] == [1]
    concept = save(small_base, f"{name}=.safetensors", "rex")
    for word in (concept, f"rex={concept}"):
        assert [entry["file"] for entry in arguments.read_concepts([word])] == [concept]


def test_only_what_was_drawn_is_replaced(recipe, tmp_path):
    out = to_path(tmp_path / "rex.png")
    rendering.write(recipe, [[Drawn(np.zeros((2, 8, 8, 3), np.uint8), None)]], out)
    files = rendering.files_of(recipe, out)
    assert sorted(files) == sorted(tmp_path.glob("*.png"))
    rendering.check_replaced([*files, tmp_path / "new.png"])
    assert rendering.files_of(recipe._replace(sweep=("bias", [0.4])), out) == [out]
    Image.new("RGB", (8, 8)).save(files[0])  # somebody's own
    with pytest.raises(InputError, match=r"rex_0\.png: is there already, and perfusion_jax\.sample has not drawn it"):
        rendering.check_replaced(map(to_path, files))


def test_concept_files_that_cannot_be_used(recipe, small_base, rex, tmp_path, monkeypatch):
    broken = {
        "cut.safetensors": rex.read_bytes()[:500],
        "edited.safetensors": rex.read_bytes().replace(b'"target_input"', b'"target_imput"'),
        "pickle.safetensors": pickle.dumps({"embedding": [1.0]}),
        "foreign.safetensors": re.sub(rb'("fingerprint":"\[).', rb"\g<1>9", rex.read_bytes()),
    }
    messages = ["not a complete safetensors file", "target_imput is not known", "not a complete safetensors file"]
    messages += ["trained on the base model small, which .* is not"]
    monkeypatch.setattr(pickle, "loads", None)
    for (name, data), message in zip(broken.items(), messages, strict=True):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}: .*{message}"):
            rendering.draw(recipe._replace(concepts=arguments.read_concepts([str(tmp_path / name)])), small_base)
    with pytest.raises(InputError, match="nowhere: no such concept file"):
        arguments.read_concepts([str(tmp_path / "nowhere")])
    (tmp_path / "[run]" / "concepts").mkdir(parents=True)
    shutil.copy(rex, tmp_path / "[run]" / "concepts")
    for given in (f"{tmp_path}/[run]", f"tom={tmp_path}/[run]", f"{tmp_path}/[run]/concepts"):
        with pytest.raises(
            InputError, match=r"a folder, and not a concept file; give one of its files: .*rex.safetensors"
        ):
            arguments.read_concepts([given])


def test_a_picture_is_not_believed_blindly(recipe, rex, tmp_path, capsys):
    file = tmp_path / "picture.png"
    source = recipe.base["source"]
    write_picture(file, np.zeros((8, 8, 3), np.uint8), recipe._asdict())
    with pytest.raises(InputError, match=r"drawn on the base model .*; give --base"):
        arguments.recipe_of_picture(file, False, "emoji")
    assert arguments.recipe_of_picture(file, True, source).prompts == recipe.prompts
    said = capsys.readouterr()
    assert "warning: drawn with perfusion_jax 0" in said.err
    assert not said.out  # which is the recipe's, as JSON
    rex.write_bytes(rex.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"rex.safetensors: the concept has changed since"):
        arguments.recipe_of_picture(file, True, source)
    options = {name: value for name, value in recipe.options.items() if name != "spacing"}
    write_picture(file, np.zeros((8, 8, 3), np.uint8), recipe._replace(options=options)._asdict())
    assert recipes.read_recipe(file).options == recipe.options  # of before there was a spacing
    write_picture(file, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="does not say how it was drawn"):
        load_recipe(file)
    write_picture(file, np.zeros((8, 8, 3), np.uint8), {"format": "another"})
    with pytest.raises(InputError, match="another version of perfusion_jax"):
        arguments.recipe_of_picture(file, False, "emoji")
    of_two = {"prompts": ["a <rex>"]}  # and two seeds
    for change in ({"base": ["sd15"]}, {"concepts": [{"name": "rex"}]}, {"seeds": ["1", 2]}, {"columns": 0}, of_two):
        write_picture(file, np.zeros((8, 8, 3), np.uint8), recipe._asdict() | change)
        with pytest.raises(InputError, match=r"picture\.png: its record of how it was drawn was changed: (\w+) cannot"):
            recipes.read_recipe(file)
    for change in ({"steps": "2"}, {"bias": ["a"]}, {"sampler": [1]}, {"batch_size": 0}, {"negative_prompt": 1}):
        write_picture(file, np.zeros((8, 8, 3), np.uint8), recipe._replace(options=recipe.options | change)._asdict())
        with pytest.raises(InputError, match=rf"was changed: {next(iter(change))} cannot be"):
            recipes.read_recipe(file)
    (tmp_path / "text.png").write_text("a picture")
    for name, message in (("text.png", "not a picture"), ("nowhere.png", "no such picture")):
        with pytest.raises(InputError, match=message):
            load_recipe(tmp_path / name)

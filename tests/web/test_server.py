"""The studio over HTTP, without a browser: what it refuses, and whom."""

import base64
import http.client
import io
import json
import os
import re
import socket
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from perfusion_jax.drawing.recipe import OPTIONS
from perfusion_jax.formats.concept_file import ConceptCard, save_concept
from perfusion_jax.formats.picture_file import load_recipe, write_picture
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.studio import PASSWORD, check_password, listen, token_of
from perfusion_jax.web import server
from perfusion_jax.web.easel import Easel
from perfusion_jax.web.forms import Form
from perfusion_jax.web.jobs import Jobs
from perfusion_jax.web.server import make_app
from perfusion_jax.web.studio import Studio

KEYS = "validation_prompts=()\ntemplates=('a {}',)"
SMALL = {"steps": 2, "width": 32, "height": 32, "sampler": "ddim"}


def save(base, file, name, **changes):
    concept = base.new_concept("dog", jnp.eye(base.model.context_width))
    card = ConceptCard(name, "dog", "small", base.fingerprint, 0.6, 0.15, guidance_scale=6.0, step=1, **changes)
    save_concept(file, concept, card)


@pytest.fixture
def studio(small_folder, small_base, tmp_path):
    """A studio whose queue does not learn, with a concept in its library."""
    runs = tmp_path / "runs"
    save(small_base, runs / "rex" / "concepts" / "rex.safetensors", "rex")
    return Studio(runs, Easel(runs, {"source": str(small_folder), "revision": None, "variant": None}), Jobs(runs))


@pytest.fixture
def client(studio):
    return TestClient(make_app(studio, None, local=True), base_url="http://127.0.0.1:7860")


def picture(size=(40, 30), kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, kind)
    return stream.getvalue()


def drop(client, *files):
    sent = client.post("/api/drop", files=[("files", each) for each in files])
    return sent.status_code, sent.json()


def settled(client):
    """The state of a studio whose model is there, or cannot be loaded."""
    until = time.monotonic() + 60
    while (state := client.get("/api/state").json())["loading"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    return state


def drawn(client, **form):
    sent = client.post("/api/draw", json={**SMALL, **form})
    return [json.loads(line) for line in sent.text.splitlines()]


def test_the_page_comes_whole_and_may_fetch_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200
    assert "Perfusion studio" in page.text
    files = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert files
    assert all(client.get(file).status_code == 200 for file in files)
    for name in ("common.js", "draw.js", "learn.js", "library.js"):
        assert client.get(f"/page/{name}").status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://", page.text)


def test_only_this_machine_is_answered_under_its_own_names(client):
    assert client.get("/api/state").status_code == 200
    assert client.get("/api/state", headers={"host": "evil.example:7860"}).status_code == 400
    assert client.get("/api/state", headers={"host": "localhost:7860"}).status_code == 200


def test_what_pages_of_other_sites_send_is_refused(client):
    own, other = {"origin": "http://127.0.0.1:7860"}, {"origin": "http://evil.example"}
    assert client.post("/api/kind", json={"kind": "dog"}, headers=own).status_code == 200
    assert client.post("/api/kind", json={"kind": "dog"}, headers=other).status_code == 403
    assert client.post("/api/kind", json={"kind": "dog"}, headers={"origin": "null"}).status_code == 403


def test_a_password_is_asked_for_everywhere(studio):
    client = TestClient(make_app(studio, "secret ü", local=False))
    for path in ("/", "/api/state", "/page/main.js", "/grid?key=rex/rex"):
        refused = client.get(path)
        assert refused.status_code == 401
        assert "Basic" in refused.headers["www-authenticate"]
        assert client.get(path, auth=("studio", "wrong")).status_code == 401
        assert client.get(path, headers={"authorization": "Basic ???"}).status_code == 401
    assert client.get("/", auth=("studio", "secret ü".encode())).status_code == 200
    assert client.post("/api/kind", json={"kind": "dog"}).status_code == 401


def test_others_are_let_in_by_a_password_alone(monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    assert check_password("127.0.0.1") is None
    with pytest.raises(InputError, match=f"give a password, in the variable {PASSWORD}"):
        check_password("0.0.0.0")
    monkeypatch.setenv(PASSWORD, "x")
    assert check_password("0.0.0.0") == check_password("127.0.0.1") == "x"


def test_a_port_that_is_taken_is_told():
    with listen("127.0.0.1", 0) as first, pytest.raises(InputError, match="take another --port"):
        listen("127.0.0.1", first.getsockname()[1])


def test_pictures_are_checked_by_their_content(client, studio):
    status, sent = drop(client, ("../../x.png", picture()), ("b.jpg", picture(kind="JPEG")))
    assert status == 200
    draft = studio.drafts[sent["draft"]]
    assert sorted(file.name for file in draft.folder.iterdir()) == ["picture_01.png", "picture_02.jpg"]
    assert draft.folder.is_relative_to(studio.runs)
    status, sent = drop(client, ("a.png", picture()), ("dog.png", b"<svg onload=alert(1)>"))
    assert status == 400
    assert sent["error"].startswith("dog.png: not a picture")
    assert not list((studio.runs / ".studio" / "uploads").iterdir())


def test_too_much_is_refused_before_it_is_read(client, monkeypatch):
    monkeypatch.setattr(server, "MOST_DROPPED", 1000)
    status, sent = drop(client, ("a.bmp", picture(kind="BMP")))
    assert status == 400
    assert "at most 0 are taken at once" in sent["error"]
    monkeypatch.setattr(server, "MOST_SENT", 100)
    refused = client.post("/api/draw", json={"prompt": "x" * 200})
    assert refused.status_code == 400
    assert "more was sent than" in refused.json()["error"]
    many = [("files", (f"{number}.png", picture())) for number in range(65)]
    monkeypatch.setattr(server, "MOST_DROPPED", 10**9)
    sent = client.post("/api/drop", files=many)
    assert sent.status_code == 400
    assert "Too many files" in sent.json()["error"]
    sent = client.post("/api/recipe", files=many[:2])
    assert "Too many files" in sent.json()["error"]


@pytest.mark.parametrize("path", ["look", "learn", "kind", "act", "rename", "delete", "export", "draw"])
@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"7", b'{"prompt": 1, "key": {}, "draft": [], "act": 5, "kind": [1]}', b"[" * 100_000),
        b'{"prompt": "a", "seed": 1%s, "draft": "x", "key": "\\ud800", "act": "\\ud800", "kind": "\\ud800"}'
        % (b"0" * 400),
    ],
)
def test_nonsense_is_refused_in_words(client, path, body):
    sent = client.post(f"/api/{path}", content=body)
    text = sent.text
    assert "error" in json.loads(text.splitlines()[-1])
    assert "fault of the program" not in text


def test_no_path_of_the_page_is_opened(client, studio, tmp_path):
    secret = studio.runs / "secret.png"
    secret.write_bytes(picture())
    (studio.runs / "drawings").mkdir()
    (studio.runs / "exports" / "rex" / "lora").mkdir(parents=True)
    assert (studio.runs / "drawings" / "../secret.png").exists()
    for name in ("../secret.png", str(secret), "..", ""):
        with pytest.raises(InputError, match="no such drawing"):
            studio.drawing(name)
        with pytest.raises(InputError, match="no such export"):
            studio.exported("rex", "lora", f"../../{name}")
    with pytest.raises(InputError, match="no such export"):
        studio.exported("..", ".", "secret.png")
    with pytest.raises(InputError, match="no pictures"):
        studio.grid_of_run("rex/../rex")
    (tmp_path / "secret.png").write_bytes(picture())
    assert client.get("/page/main.js").status_code == 200
    for path in ("/drawings/..%2fsecret.png", "/page/..%2fserver.py", "/page/%2e%2e/server.py"):
        assert client.get(path).status_code == 404
    record = {
        **{"base": studio.easel.source, "prompts": ["x"], "seeds": [0], "columns": 1, "init_image": None},
        **{"sweep": None, "versions": {}, "format": "perfusion_jax picture 1", "tree": None},
        "concepts": [{"name": "rex", "file": str(tmp_path / "secret.png"), "sha256": "0"}],
        "options": {**dict.fromkeys(OPTIONS), "batch_size": 1},
    }
    write_picture(tmp_path / "hostile.png", np.zeros((8, 8, 3), np.uint8), record)
    sent = client.post("/api/recipe", files=[("files", ("hostile.png", (tmp_path / "hostile.png").read_bytes()))])
    assert sent.status_code == 400
    assert "is not in the library" in sent.json()["error"]
    assert "secret" not in sent.text


def test_draws_picture_by_picture_and_gets_the_recipe_back(client, studio):
    first, *pictures = drawn(
        client, prompt="a photo of a <rex>", count=2, seed=5, concepts={"rex": {"bias": 0.123456789}}
    )
    assert first["command"][:3] == ["python", "-m", "perfusion_jax.sample"]
    assert "0.123456789" in first["command"]
    assert not first["sweep"]
    assert [each["label"] for each in pictures] == ["seed 5", "seed 6"]
    words = [word["text"] for word in pictures[0]["words"]]
    assert words == ["a", "photo", "of", "a", "<rex>"]
    assert pictures[0]["words"][4]["looks"].startswith("data:image/png;base64,")
    file = client.get(f"/drawings/{pictures[1]['file']}")
    assert file.headers["content-type"] == "image/png"
    recipe = load_recipe(studio.runs / "drawings" / pictures[1]["file"])
    assert recipe["seeds"] == [6]
    assert recipe["options"]["bias"] == [0.123456789]
    back = client.post(f"/api/recipe?drawing={pictures[1]['file']}", json={}).json()
    assert (back["prompt"], back["seed"], back["concepts"]["rex"]["bias"]) == ("a photo of a <rex>", 6, 0.123456789)
    again = client.post("/api/recipe", files=[("files", ("mine.png", file.content))]).json()
    assert again == back
    kept = settled(client)["drawings"]
    assert [each["name"] for each in kept] == [each["file"] for each in reversed(pictures)]
    # Browsers keep what its address tells apart from any other that was called so, and nothing else.
    address = f"/drawings/{kept[0]['name']}"
    for ending, keeps in {f"?at={kept[0]['at']}": True, "?at=1": False, "": False}.items():
        assert ("max-age" in client.get(address + ending).headers["cache-control"]) is keeps
    (studio.runs / "drawings" / kept[0]["name"]).unlink()
    gone = client.get(f"{address}?at={kept[0]['at']}")
    assert (gone.status_code, gone.headers["cache-control"]) == (404, "no-store")
    assert client.get("/grid?at=1").headers["cache-control"] == "no-store"


def test_a_control_changes_the_picture_and_a_sweep_draws_each_value(client, studio):
    def pixels(each):
        with Image.open(studio.runs / "drawings" / each["file"]) as image:
            return image.tobytes()

    _, strong = drawn(client, prompt="a <rex>", concepts={"rex": {"strength": 2}})
    _, none = drawn(client, prompt="a <rex>", concepts={"rex": {"strength": 0}})
    sweep = {"control": "strength", "first": 0, "last": 2, "count": 3}
    told, *swept = drawn(client, prompt="a <rex>", sweep=sweep)
    assert told["sweep"]
    assert "--sweep" in told["command"]
    assert "strength=0:2:3" in told["command"]
    assert [each["label"] for each in swept] == [f"seed 0, strength {value}" for value in (0, 1, 2)]
    assert pixels(swept[0]) == pixels(none) != pixels(strong) == pixels(swept[2])


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a <bob>"}, "<bob> is not in the library; there are <rex>"),
        ({"prompt": "a", "count": 65}, "count is 65; it must be from 1 to 64"),
        ({"prompt": "a", "steps": 0}, "steps is 0"),
        ({"prompt": "a", "width": 33}, "33"),
        ({"prompt": "a", "lock": "both"}, "lock: it must be one of 'local', 'global'"),
        ({"prompt": "a <rex>", "concepts": {"rex": {"bias": "x"}}}, "bias: it must be a number"),
        ({"prompt": "a <rex>", "concepts": {"rex": {"temperature": 0}}}, "temperature is 0"),
        ({"prompt": "a <rex>", "sweep": {"control": "seed", "first": 0, "last": 1, "count": 2}}, "seed: sweeps one of"),
        ({"prompt": "a", "sweep": {"control": "bias", "first": 0}}, "2 to 16 pictures"),
        ({"prompt": "a", "sweep": {"control": "bias", "first": 0, "last": 1, "count": 2}}, "bias changes nothing here"),
        (
            {"prompt": "a <rex>", "count": 9, "sweep": {"control": "bias", "first": 0, "last": 1, "count": 8}},
            "at most 64 are drawn at once",
        ),
        ({"prompt": "a <rex>", "concepts": {"rex": {"start": 0.9, "end": 0.1}}}, "begin before it ends"),
        ({"prompt": "a", "init_image": "../x"}, "give it again"),
        ({"prompt": "dog " * 90}, "tokens; this text encoder takes"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(client, form, words):
    told = drawn(client, **form)
    assert words in told[-1]["error"]
    assert not any("file" in each for each in told)
    assert "fault of the program" not in told[-1]["error"]


def test_a_picture_to_start_from_is_one_that_was_dropped(client):
    _, sent = drop(client, ("start.png", picture((64, 48))))
    *_, drawing = drawn(client, prompt="a dog", init_image=sent["draft"], init_strength=0.5)
    assert drawing["width"] == drawing["height"] == 32


def test_the_library_is_renamed_exported_and_deleted(client, studio):
    assert client.post("/api/rename", json={"key": "rex/rex", "name": "max"}).json() == "rex/max"
    (entry,) = settled(client)["entries"]
    assert entry["call"] == "max"
    assert entry["drawable"]
    assert entry["facts"]["kind"] == "dog"
    sent = client.post("/api/export", json={"key": "rex/max", "to": "lora"}).json()
    assert "max_lora.safetensors" in sent["files"]
    assert sent["command"][:5] == ["python", "-m", "perfusion_jax.export", "--concept", entry["facts"]["file"]]
    assert ["--base", str(studio.easel.source["source"])] == sent["command"][7:9]
    for file in sent["files"]:
        assert client.get(f"/exports/max/lora/{file}").content == (studio.runs / "exports/max/lora" / file).read_bytes()
    assert "no kind of export" in client.post("/api/export", json={"key": "rex/max", "to": "x"}).json()["error"]
    goes = client.post("/api/doomed", json={"key": "rex/max"}).json()
    assert goes["files"][0] == "rex/concepts/max.safetensors"
    assert goes["photographs"] == ""
    assert client.post("/api/delete", json={"key": "rex/max"}).status_code == 200
    assert client.get("/api/state").json()["entries"] == []
    assert "no such concept" in client.post("/api/delete", json={"key": "rex/max"}).json()["error"]


def test_a_concept_of_another_model_is_shown_and_not_drawn(client, studio, sd1_base):
    save(sd1_base, studio.runs / "tom" / "concepts" / "tom.safetensors", "tom")
    entries = {entry["call"]: entry for entry in settled(client)["entries"]}
    assert entries["rex"]["drawable"]
    assert not entries["tom"]["drawable"]
    assert entries["tom"]["obstacle"].startswith("learnt on small; this studio draws on")
    assert drawn(client, prompt="a <tom>")[-1]["error"].startswith("<tom> was learnt on small; this studio draws on")


def test_pictures_are_looked_at_and_learnt_with_the_masks_that_were_painted(client, studio):
    _, sent = drop(client, ("a.png", picture()), ("b.png", picture((30, 40))))
    form = {"draft": sent["draft"], "name": "tom", "kind": "dog", "masks": "none", "keys": KEYS}
    looked = client.post("/api/look", json=form).json()
    assert [each["name"] for each in looked["previews"]] == ["a.png", "b.png"]
    mask = Image.new("L", (384, 384))
    mask.paste(255, (0, 0, 384, 192))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    black = server._png(np.zeros((384, 384), np.uint8))
    painted = {"0": black, "1": black}
    refused = client.post("/api/learn", json={**form, "painted": painted}).json()
    assert "picture 1: nothing of it would be learnt" in refused["error"]
    whole = Image.new("L", (384, 384), 255)
    first = io.BytesIO()
    whole.save(first, "PNG")
    painted = {str(place): base64.b64encode(each.getvalue()).decode() for place, each in enumerate((first, stream))}
    one = {"0": painted["0"]}
    assert "1 masks of 2 pictures" in client.post("/api/learn", json={**form, "painted": one}).json()["error"]
    assert client.post("/api/learn", json={**form, "painted": painted}).status_code == 200
    (job,) = client.get("/api/state").json()["jobs"]
    assert (job["run"], job["things"], job["state"]) == ("tom", ["tom, a dog"], "waiting")
    assert "--config.masks=files" in job["command"]
    folder = studio.runs / "pictures" / "tom"
    assert sorted(file.name for file in (folder / "masks").iterdir()) == ["picture_01.png", "picture_02.png"]
    with (
        Image.open(folder / "masks" / "picture_01.png") as first,
        Image.open(folder / "masks" / "picture_02.png") as second,
    ):
        assert first.size == (40, 30)
        assert first.getextrema() == (255, 255)
        assert second.getpixel((15, 5)) == 255
        assert second.getpixel((15, 35)) == 0
    taken = client.post("/api/learn", json={**form, "name": "tom"}).json()
    assert "a run called tom already" in taken["error"]


@pytest.mark.parametrize(("name", "words"), [("../x", "take letters"), ("pictures", "own folders"), ("rex", "already")])
def test_names_that_cannot_be_are_refused_before_pictures_move(client, name, words):
    _, sent = drop(client, ("a.png", picture()))
    form = {"draft": sent["draft"], "name": name, "kind": "dog", "masks": "none", "keys": KEYS}
    assert words in client.post("/api/learn", json=form).json()["error"]
    assert client.post("/api/learn", json={**form, "name": "tom"}).status_code == 200


def test_an_error_names_a_picture_as_the_person_does(client):
    _, sent = drop(client, ("my dog.png", picture((8, 8))))
    form = {"draft": sent["draft"], "kind": "dog", "masks": "none", "keys": KEYS}
    assert client.post("/api/look", json=form).json()["error"].startswith("my dog.png: 8 x 8 pixels")
    large = {**form, "keys": f"{KEYS}\nsize=4096"}
    assert client.post("/api/look", json=large).json()["error"] == "size is 4096; on the page it must be at most 2048"
    assert "drop them again" in client.post("/api/look", json={**form, "draft": "nothing"}).json()["error"]


def test_a_kind_that_is_no_word_is_warned_of(client):
    assert client.post("/api/kind", json={"kind": "dog"}).json() == {"warning": ""}
    assert "no word 'dgoqx'" in client.post("/api/kind", json={"kind": "dgoqx"}).json()["warning"]


def test_a_model_that_cannot_be_loaded_is_told_once_and_the_library_stays(studio, tmp_path, monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append(options["source"])
        raise [InputError("no such model"), OSError("disk")][len(asked) - 1]

    monkeypatch.setattr("perfusion_jax.web.easel.load_base_model", load)
    client = TestClient(make_app(studio, None, local=True), base_url="http://127.0.0.1:7860")
    for again, words in enumerate(("no such model", "OSError: disk")):
        for _ in range(3):
            state = settled(client)
            (entry,) = state["entries"]
            assert (entry["call"], entry["drawable"]) == ("rex", False)
            assert entry["obstacle"] == "the base model could not be loaded"
        assert "the base model cannot be loaded" in state["problem"]
        assert words in state["problem"]
        assert len(asked) == again + 1
        if not again:
            client.post("/api/act", json={"act": "load"})


def test_the_page_is_shown_while_the_model_is_loaded(studio, monkeypatch):
    loaded = threading.Event()
    monkeypatch.setattr("perfusion_jax.web.easel.load_base_model", lambda *_, **__: loaded.wait(60))
    client = TestClient(make_app(studio, None, local=True), base_url="http://127.0.0.1:7860")
    state = client.get("/api/state").json()
    assert state["loading"]
    assert state["entries"][0]["obstacle"] == "the base model is being loaded"
    loaded.set()


def test_the_address_alone_lets_nobody_in(studio):
    app = make_app(studio, None, local=True, token="secret")
    client = TestClient(app, base_url="http://127.0.0.1:7860", follow_redirects=False)
    for path in ("/", "/?token=wrong", "/api/state", "/page/main.js", "/grid?key=rex/rex&token="):
        refused = client.get(path)
        assert refused.status_code == 403
        assert "the address that the studio printed" in refused.text
    assert client.post("/api/kind", json={"kind": "dog"}).status_code == 403
    first = client.get("/?token=secret")
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert all(word in first.headers["set-cookie"] for word in ("HttpOnly", "SameSite=strict"))
    assert client.get("/").status_code == 200
    other = TestClient(app, base_url="http://127.0.0.1:7861", cookies=client.cookies)
    assert other.get("/").status_code == 403  # the cookie is of one port's studio


def test_the_token_stays_and_is_its_owners_alone(tmp_path):
    token = token_of(tmp_path)
    assert len(token) >= 32
    assert token_of(tmp_path) == token
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0


def test_a_name_of_the_studios_own_folders_is_refused_however_it_is_written(client, studio):
    _, sent = drop(client, ("a.png", picture()))
    form = {"draft": sent["draft"], "name": "Pictures", "kind": "dog", "masks": "none", "keys": KEYS}
    assert "own folders" in client.post("/api/learn", json=form).json()["error"]
    assert "own folders" in client.post("/api/rename", json={"key": "rex/rex", "name": "DRAWINGS"}).json()["error"]


def test_pictures_stay_a_draft_where_the_queue_cannot_be_written(client, studio, monkeypatch):
    _, sent = drop(client, ("a.png", picture()))
    form = {"draft": sent["draft"], "name": "tom", "kind": "dog", "masks": "none", "keys": KEYS}
    with monkeypatch.context() as patched:

        def full(*arguments):
            raise InputError("disk full")

        patched.setattr(studio.jobs, "add", full)
        assert client.post("/api/learn", json=form).json()["error"] == "disk full"
    assert not list((studio.runs / "pictures").iterdir())
    assert client.post("/api/learn", json=form).status_code == 200


def test_what_was_looked_at_is_not_looked_at_again(client, studio, monkeypatch):
    _, sent = drop(client, ("a.png", picture()))
    form = {"draft": sent["draft"], "name": "tom", "kind": "dog", "masks": "none", "keys": KEYS}
    assert client.post("/api/look", json=form).status_code == 200
    asked = []
    monkeypatch.setattr(studio, "look", lambda form: asked.append(form))
    assert client.post("/api/learn", json={**form, "name": "tim"}).status_code == 200
    assert len(asked) == 1  # another name: other masks may be found
    _, sent = drop(client, ("a.png", picture()))
    monkeypatch.undo()
    form["draft"] = sent["draft"]
    assert client.post("/api/look", json=form).status_code == 200
    monkeypatch.setattr(studio, "look", lambda form: asked.append(form))
    assert client.post("/api/learn", json=form).status_code == 200
    assert len(asked) == 1


def test_what_is_dropped_takes_the_place_of_what_the_same_page_dropped(client, studio):
    def of(view):
        sent = client.post(f"/api/drop?view={view}", files=[("files", ("a.png", picture()))])
        return studio.drafts[sent.json()["draft"]].folder

    first, other, second = of("a"), of("b"), of("a")
    assert (first.exists(), other.exists(), second.exists()) == (False, True, True)


def test_a_picture_to_start_from_goes_where_nothing_was_drawn(client, studio):
    _, sent = drop(client, ("my start.png", picture((8, 8), "PNG")))
    form = {"prompt": "a dog", "init_image": sent["draft"]}
    assert "error" in drawn(client, **form, steps=2000)[-1]
    assert "error" in drawn(client, **{**form, "prompt": "dog " * 90})[-1]
    assert not list((studio.runs / ".studio" / "starts").glob("*"))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    half = base64.b64decode(server._png(noise).partition(",")[2])[:2000]
    _, sent = drop(client, ("my start.png", half))
    assert drawn(client, prompt="a dog", init_image=sent["draft"])[-1]["error"].startswith("my start.png: ")


def test_drawing_stops_where_nobody_waits_for_it(client, studio):
    _ = studio.easel.base
    taken = []

    def wanted():
        taken.append(1)
        return len(taken) < 20

    form = Form({**SMALL, "prompt": "a dog", "steps": 500})
    assert [each for each in studio.draw(form, wanted) if "file" in each] == []
    assert len(taken) == 20
    with studio.easel._busy:  # another one is drawn: this one gives its place up all the same
        taken[:] = [1] * 17
        assert [each for each in studio.draw(form, wanted) if "file" in each] == []


def test_a_closed_page_stops_its_drawing(studio):
    uvicorn = pytest.importorskip("uvicorn")
    app = make_app(studio, None, local=True)
    with listen("127.0.0.1", 0) as listening:
        serving = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            port = listening.getsockname()[1]
            asking = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            body = json.dumps({**SMALL, "prompt": "a dog", "steps": 1000, "count": 64})
            asking.request("POST", "/api/draw", body, {"Content-Type": "application/json"})
            assert b"command" in asking.getresponse().readline()
            until = time.monotonic() + 60
            while not studio.easel._busy.locked():
                assert time.monotonic() < until
            asking.sock.shutdown(socket.SHUT_RDWR)
            asking.close()
            while studio.easel._busy.locked():
                assert time.monotonic() < until
                time.sleep(0.02)
            assert len(studio.easel.drawn_before(64)) < 64
        finally:
            serving.should_exit = True
            thread.join(60)


def test_what_is_odd_about_a_drawing_is_told(client):
    first, *_ = drawn(client, prompt="a (dog:1.2)", steps=1)
    assert first["warnings"][0].startswith("(dog:1.2): weights, brackets")
    assert "--" not in "".join(first["warnings"])


def test_files_that_are_gone_or_have_odd_names_do_not_keep_the_page_from_its_state(small_base, client, studio):
    odd = studio.runs / os.fsdecode(b"\xff")
    save(small_base, odd / "concepts" / "max.safetensors", "max")
    (odd / "config.json").write_text("[" * 100_000)
    (odd / "metrics.jsonl").write_text("[" * 100_000)
    for file in (studio.runs / "drawings" / os.fsdecode(b"\xff.png"), studio.runs / "drawings" / "9.png"):
        file.parent.mkdir(exist_ok=True)
        file.symlink_to(studio.runs / "nothing")
    state = settled(client)
    assert [entry["name"] for entry in state["entries"]] == ["rex", "max"]
    assert client.get("/drawings/9.png").status_code == 404
    assert client.post("/api/recipe?drawing=9.png", json={}).json()["error"] == "9.png: it is not there any more"
    refused = client.post("/api/delete", content=json.dumps({"key": state["entries"][1]["key"]})).json()
    assert "key: it must be text" in refused["error"]


def test_an_animated_picture_is_no_recipe(client):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(
        stream, "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")], duration=9
    )
    sent = client.post("/api/recipe", files=[("files", ("a.png", stream.getvalue()))])
    assert sent.json()["error"] == "a.png: not a PNG, as perfusion_jax writes them"

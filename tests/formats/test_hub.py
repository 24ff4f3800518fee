"""Uploading to a hub that runs in the test."""

import dataclasses

import pytest
from exported import learnt
from fake_hub import reach, serve
from huggingface_hub import ModelCard

from perfusion_jax import InputError
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.formats.exporting import export
from perfusion_jax.formats.hub import push
from perfusion_jax.runtime.errors import UnavailableError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serve({}) as running:
        reach(running, tmp_path / "cache", monkeypatch)
        yield running


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "export"
    (folder / "tree").mkdir(parents=True)
    for name in ("README.md", "rex_lora.safetensors", "tree/data", "mine.txt"):
        (folder / name).write_text(name)
    return folder


FILES = ["README.md", "rex_lora.safetensors", "tree/*"]


def test_what_was_exported_goes_up_and_is_private(hub, folder):
    url = push(folder, FILES, "me/rex", public=False)
    assert url == f"{hub.url}/me/rex"
    assert hub.private == {"me/rex": True}
    assert hub.uploaded["me/rex"] == {
        name: name.encode() for name in ("README.md", "rex_lora.safetensors", "tree/data")
    }
    push(folder, FILES, "me/rex", public=False)  # anew


def test_what_is_public_is_asked_for(hub, folder):
    push(folder, FILES, "me/rex", public=True)
    assert hub.private == {"me/rex": False}
    hub.uploaded.clear()
    with pytest.raises(InputError, match=r"^me/rex: everybody can see this repository; give --public"):
        push(folder, FILES, "me/rex", public=False)
    assert not hub.uploaded


def test_a_card_that_the_hub_does_not_take_is_one_line(hub, folder):
    (folder / "README.md").write_text("---\nlicense: my own\n---\n")
    with pytest.raises(
        InputError, match=r"me/rex: the hub said: Invalid metadata in README.md.*must be one of"
    ) as told:
        push(folder, FILES, "me/rex", public=False)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("licence", "known"),
    [("CC BY 4.0", "cc-by-4.0"), ("MIT", "mit"), ("", "unknown"), ('my own "photos": mine', "other")],
)
def test_whatever_licence_somebody_names_the_hub_takes_the_card(hub, sd1_base, tmp_path, licence, known):
    concept, card = learnt(sd1_base)
    rex = TrainedConcept(concept, dataclasses.replace(card, licence=licence))
    export(sd1_base, [rex], "lora", tmp_path / "out")
    push(tmp_path / "out", FILES, "me/rex", public=False)
    written = ModelCard.load(tmp_path / "out" / "README.md").data
    assert written.license == known
    assert written.license_name == ("my-own-photos-mine" if known == "other" else None)
    assert licence in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, InputError, "the hub does not allow it .*hf auth login"),
        (403, InputError, "the hub does not allow it"),
        (500, UnavailableError, "the hub said"),
    ],
)
def test_what_a_hub_refuses_is_one_line(hub, folder, status, kind, message):
    hub.refuses = status
    with pytest.raises(kind, match=message) as raised:
        push(folder, FILES, "me/rex", public=False)
    assert "\n" not in str(raised.value)


def test_a_hub_that_is_not_there(hub, folder):
    hub.close()
    with pytest.raises(UnavailableError, match="me/rex: the hub cannot be reached"):
        push(folder, FILES, "me/rex", public=False)
    with pytest.raises(InputError, match="the hub said"):
        push(folder, FILES, "not a name", public=False)

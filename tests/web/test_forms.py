"""What the studio's page sends, checked."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.web.forms import Form, parse_keys, thing_config

EMOJI = {"source": "emoji", "revision": None, "variant": None}


def png(side, mode="L", kind="PNG"):
    stream = io.BytesIO()
    Image.new(mode, (side, side), 200).save(stream, kind)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def bomb():
    """A PNG that says that it has 400 million pixels."""
    data = bytearray(base64.b64decode(png(8).partition(",")[2]))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return base64.b64encode(data).decode()


def test_values_that_are_left_out_are_the_default():
    form = Form({"name": None, "steps": ""})
    assert form.text("name") == ""
    assert form.number("steps", 0, 1) is None
    assert form.whole("steps", 0, 1) is None
    assert form.flag("crop", True) is True
    assert form.one_of("lock", ("local", "global")) == "local"
    assert form.picture("mask", 8, "L") is None
    assert form.parts("masks") == {}
    assert form.part("sweep").text("x") == ""


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda form: form.text("list"), "list: it must be text"),
        (lambda form: form.text("long"), "long: it must be text of at most 2000"),
        (lambda form: form.number("word", 0, 1), "word: it must be a number"),
        (lambda form: form.number("yes", 0, 1), "yes: it must be a number"),
        (lambda form: form.number("huge", 0, 1), "huge is 1000000000; it must be from 0 to 1"),
        (lambda form: form.number("infinite", 0, 1), "infinite: it must be a number"),
        (lambda form: form.whole("half", 0, 1), "half is 0.5; it must be a whole number"),
        (lambda form: form.flag("word", True), "word: it must be true or false"),
        (lambda form: form.one_of("word", ("a", "b")), "word: it must be one of 'a', 'b'"),
        (lambda form: form.part("list"), "no object"),
        (lambda form: form.parts("list"), "list: it must be an object"),
        (lambda form: form.picture("word", 8, "L"), "word: not a PNG"),
        (lambda form: form.picture("wide", 8, "L"), "wide: it must have 8 x 8 pixels"),
        (lambda form: form.picture("jpeg", 8, "L"), "jpeg: not a PNG"),
        (lambda form: form.picture("bomb", 8, "L"), "bomb: not a PNG"),
        (lambda form: form.number("whole", 0, 1), "whole: it must be a number"),
        (lambda form: form.text("halved"), "halved: it must be text"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(read, words):
    sent = {
        "list": [1],
        "long": "x" * 2001,
        "word": "x",
        "yes": True,
        "huge": 1e9,
        "infinite": float("inf"),
        "half": 0.5,
        "whole": 10**400,
        "halved": "\ud800",
        "bomb": bomb(),
    }
    with pytest.raises(InputError, match=words):
        read(Form(sent | {"wide": png(9), "jpeg": png(8, kind="JPEG")}))


def test_what_is_no_object_is_refused():
    with pytest.raises(InputError, match="no object"):
        Form(["a"])


def test_a_painted_picture_is_read():
    assert np.array_equal(Form({"mask": png(8)}).picture("mask", 8, "L"), np.full((8, 8), 200, np.uint8))


def test_keys_are_read_as_a_config_file_would_give_them():
    text = "bias = 1\nvalidate_every=0\n\n templates=('a {}', 'my {}')\nevaluator=none\ndtype=float32\nlock_keys=False"
    assert parse_keys(text) == {
        "bias": 1.0,
        "validate_every": 0,
        "templates": ("a {}", "my {}"),
        "evaluator": "none",
        "dtype": "float32",
        "lock_keys": False,
    }


@pytest.mark.parametrize(
    "line", ["bias", "nothing=1", "pictures=/etc", "base=other/model", "covariance=/etc/passwd", "crop=False", "="]
)
def test_other_keys_and_paths_are_refused(line):
    with pytest.raises(InputError, match="write KEY=VALUE"):
        parse_keys(line)
    with pytest.raises(InputError, match="can only be 'none'"):
        parse_keys("evaluator=/etc")


def test_keys_that_are_too_large_or_too_deep_are_refused():
    with pytest.raises(InputError, match="bias: the number is too large"):
        parse_keys(f"bias=1{'0' * 400}")
    assert parse_keys(f"templates={'-' * 1900}1")["templates"]  # which the check of the config refuses


def test_the_config_of_a_thing_is_checked():
    form = Form({"kind": " dog ", "steps": 50, "crop": False, "keys": "batch_size=8"})
    config = thing_config(EMOJI, form, "rex", "pictures/rex")
    assert (config.name, config.super_category, config.steps, config.crop, config.batch_size) == (
        "rex",
        "dog",
        50,
        False,
        8,
    )
    assert config.flip is True
    assert config.seed == 0
    assert config.base == "emoji"
    with pytest.raises(InputError, match="what kind of thing"):
        thing_config(EMOJI, Form({}), "rex", "x")
    with pytest.raises(InputError, match=r"config\.batch_size is 'many'"):
        thing_config(EMOJI, Form({"kind": "dog", "keys": "batch_size=many"}), "rex", "x")

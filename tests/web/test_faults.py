"""What the page says of errors."""

import pytest

from perfusion_jax import InputError
from perfusion_jax.config import check_same, make_config, to_json
from perfusion_jax.web.faults import for_page, message_of


def test_advice_of_the_command_line_is_the_pages():
    with pytest.raises(InputError, match="take another --workdir") as caught:
        check_same(make_config(bias=1.0), to_json(make_config()), "config.json")
    assert message_of(caught.value).endswith("is 1.0); take another name")


@pytest.mark.parametrize(
    ("said", "there"),
    [
        (
            "diverged: in a new --workdir, lower config.values_rate",
            "diverged: by another name, lower config.values_rate",
        ),
        ("want --spacing trailing, others", "want the spacing of steps 'trailing', others"),
        (
            "no such model; --config.evaluator=none, with a new --workdir, does without",
            "evaluator=none, under Settings",
        ),
        ("r: the same command tries", "r: the same command tries"),
        ("The same command tries the failed ones again", "Try again tries the failed ones"),
    ],
)
def test_no_flag_is_advised(said, there):
    assert there in for_page(said)
    assert "--" not in for_page(said)


def test_a_fault_of_the_program_is_told_as_one():
    assert message_of(KeyError("x")) == "a fault of the program (see the terminal): KeyError: 'x'"

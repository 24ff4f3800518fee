"""What other programs read in prompts, and this one does not."""

import pytest

from perfusion_jax.drawing.prompts import escaped, without_syntax


@pytest.mark.parametrize(
    ("prompt", "plain", "found"),
    [
        ("a (red:1.2) dog", "a red dog", ["(red:1.2)"]),
        ("((best:1.1) quality:1.3), a dog", "best quality, a dog", ["(best:1.1)", "(best quality:1.3)"]),
        ("a [blurry] dog", "a blurry dog", ["[blurry]"]),
        ("a [cat:dog:0.5]", "a cat dog", ["[cat:dog:0.5]"]),
        ("a [cat|dog] (<rex>: .8)", "a cat dog <rex>", ["(<rex>: .8)", "[cat|dog]"]),
        ("a dog BREAK in snow AND a cat", "a dog in snow a cat", ["BREAK", "AND"]),
        ("<lora:anime_v2:0.8> a dog", "a dog", ["<lora:anime_v2:0.8>"]),
        (r"a \(good\) (dog:1.5)", "a (good) dog", ["(dog:1.5)"]),
        (
            "((masterpiece)), (best quality)",
            "masterpiece, best quality",
            ["(masterpiece)", "(best quality)", "(masterpiece)"],
        ),
        (r"(miku \(vocaloid\):1.2)", "miku (vocaloid)", [r"(miku \(vocaloid\):1.2)"]),
        (r"miku \(vocaloid\)", "miku (vocaloid)", []),
        ("a dog (my friend at 3:15 pm)", "a dog my friend at 3:15 pm", ["(my friend at 3:15 pm)"]),
    ],
)
def test_what_is_not_plain_words_is_taken_out_and_told(prompt, plain, found):
    assert without_syntax(prompt) == (plain, found)
    assert without_syntax(escaped(plain)) == (plain, [])


@pytest.mark.parametrize(
    "prompt", ["a photo of a <rex>", "a dog, 3:15 pm", "a smile :)", "breakfast AND-gate sandwich", "a  dog", ""]
)
def test_plain_prompts_stay_as_they_are(prompt):
    assert without_syntax(prompt) == (prompt, [])

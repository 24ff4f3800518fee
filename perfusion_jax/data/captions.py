"""Captions as people have them, made into prompts with one `{}` where the concept's name goes."""

import re
from collections.abc import Callable, Sequence

from absl import logging

from perfusion_jax.data.pictures import Picture
from perfusion_jax.runtime.errors import InputError

SLOT = "{}"
# What ai-toolkit and OneTrainer write for the trigger word.
MARKS = ("[trigger]", "[name]")


def with_slot(caption: str, words: Sequence[str], super_category: str) -> tuple[str, bool]:
    """Puts `{}` where a caption names the thing.

    That is at the first of these that the caption has: `{}` itself; `[trigger]`; one of the words, also as `<word>`.
    After `[trigger]` or a word the super-category's is left out ("a sks dog" is "a {}"). Where the thing is named
    again, the super-category's word stands.

    Args:
        caption: not empty.
        words: that captions may call the thing by, the likeliest first; the super-category's among them.
        super_category: the word or words for this kind of thing.

    Returns:
        (the caption with one `{}`, whether it named the thing; if not, it now begins with "a {}, ").
    """
    named = True
    if SLOT not in caption:
        for word in (*MARKS, *words):
            # A word of a caption, whatever its case, and as prompts name concepts: <word>.
            after = "" if word == super_category else rf"(?:\s+{re.escape(super_category)}(?!\w))?"
            exact = re.escape(word)
            of_thing = rf"(?:<{exact}>|(?<!\w){exact}(?!\w)){after}"
            caption, count = re.subn(of_thing, SLOT, caption, flags=re.IGNORECASE)
            if count:
                break
        else:
            caption, named = f"a {SLOT}, {caption}", False
    before, _, rest = caption.partition(SLOT)
    return before + SLOT + rest.replace(SLOT, super_category), named


def words_for(name: str, super_category: str, folder: str) -> list[str]:
    """Words that captions may call a thing by, the likeliest first.

    Args:
        name: that somebody chose for it; may be empty.
        super_category: the word or words for this kind of thing.
        folder: what kohya's folder calls it; may be empty. If that ends with the super-category, "ohwx dog", what is
            before it is a trigger. If not, the folder may be one of a trip, "10_summer": then the super-category's own
            word is likelier.
    """
    trigger = re.sub(rf"\s+{re.escape(super_category)}$", "", folder, flags=re.IGNORECASE)
    words = [folder, trigger, name, super_category] if trigger != folder else [name, super_category, folder]
    return [word for word in dict.fromkeys(words) if word]


def with_slots(
    pictures: Sequence[Picture], name: str, super_category: str, shorten: Callable[[str], str], chosen: bool = True
) -> list[Picture]:
    """Makes prompts of the captions of pictures; warns of captions that do not name the thing, or are cut.

    Args:
        pictures: as read.
        name: the concept's.
        super_category: the word or words for this kind of thing.
        shorten: cuts a prompt with a `{}` to what the text encoder takes.
        chosen: whether somebody chose the name; a default one, `concept`, is a word like any other.

    Raises:
        InputError: a caption names the thing after the text encoder's last token.
    """
    made, unnamed, cut = [], [], []
    count = sum(picture.caption is not None for picture in pictures)
    for picture in pictures:
        if picture.caption is None:
            made.append(picture)
            continue
        words = words_for(name if chosen else "", super_category, picture.trigger)
        caption, named = with_slot(picture.caption, words, super_category)
        short = shorten(caption)
        if SLOT not in short:
            raise InputError(
                f"{picture.name}: its caption names the thing after the last word that the text encoder takes: name it "
                "earlier"
            )
        if not named:
            unnamed.append(picture.name)
        if short != caption:
            cut.append(picture.name)
        made.append(picture.with_caption(short))
    if unnamed:
        logging.warning(
            "%s: %d of %d captions do not name the thing, by {}, [trigger], %s or %s, such as that of %s: each was put "
            "after 'a {}, '",
            name,
            len(unnamed),
            count,
            name,
            super_category,
            unnamed[0],
        )
    if cut:
        logging.warning(
            "%s: %d of %d captions are too long for the text encoder, such as that of %s, and were cut at the end",
            name,
            len(cut),
            count,
            cut[0],
        )
    return made

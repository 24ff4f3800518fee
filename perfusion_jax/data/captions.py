"""Captions as people have them, made into prompts with one `{}` where the concept's name goes."""

import re
from collections.abc import Callable, Sequence

from absl import logging

from perfusion_jax.data.pictures import Picture
from perfusion_jax.runtime.errors import InputError

SLOT = "{}"
# What ai-toolkit and OneTrainer write for the trigger word.
MARKS = ("[trigger]", "[name]")


def with_slot(caption: str, triggers: Sequence[str], super_category: str) -> tuple[str, bool]:
    """Puts `{}` where a caption names the thing.

    That is at the first of these that the caption has: `{}` itself; `[trigger]`; a trigger word; the super-category's
    word. After a trigger the super-category's word is left out ("a sks dog" is "a {}"). Where the thing is named again,
    the super-category's word stands.

    Args:
        caption: not empty.
        triggers: words that captions may call the thing by.
        super_category: the word or words for this kind of thing.

    Returns:
        (the caption with one `{}`, whether it named the thing; if not, it now begins with "a {}, ").
    """
    named = True
    if SLOT not in caption:
        for word in (*MARKS, *triggers, super_category):
            # A word of a caption, whatever its case; its own brackets are no part of words.
            after = "" if word == super_category else rf"(?:\s+{re.escape(super_category)}(?!\w))?"
            caption, count = re.subn(rf"(?<!\w){re.escape(word)}(?!\w){after}", SLOT, caption, flags=re.IGNORECASE)
            if count:
                break
        else:
            caption, named = f"a {SLOT}, {caption}", False
    before, _, rest = caption.partition(SLOT)
    return before + SLOT + rest.replace(SLOT, super_category), named


def with_slots(
    pictures: Sequence[Picture], name: str, super_category: str, shorten: Callable[[str], str]
) -> list[Picture]:
    """Makes prompts of the captions of pictures; warns of captions that do not name the thing, or are cut.

    Args:
        pictures: as read.
        name: the concept's.
        super_category: the word or words for this kind of thing.
        shorten: cuts a prompt with a `{}` to what the text encoder takes.

    Raises:
        InputError: a caption names the thing after the text encoder's last token.
    """
    made, unnamed, cut = [], [], []
    for picture in pictures:
        if picture.caption is None:
            made.append(picture)
            continue
        # "ohwx man" of a folder may be "ohwx man" or "ohwx" in captions.
        alone = re.sub(rf"\s+{re.escape(super_category)}$", "", picture.trigger, flags=re.IGNORECASE)
        triggers = [word for word in dict.fromkeys((picture.trigger, alone, name)) if word]
        caption, named = with_slot(picture.caption, triggers, super_category)
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
            len(pictures),
            name,
            super_category,
            unnamed[0],
        )
    if cut:
        logging.warning(
            "%s: %d of %d captions are too long for the text encoder, such as that of %s, and were cut at the end",
            name,
            len(cut),
            len(pictures),
            cut[0],
        )
    return made

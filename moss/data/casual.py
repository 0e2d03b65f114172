"""How people type: small changes to a written question that leave its numbers and its meaning alone.

Greeting before, thanks after, no question mark, lower case, a slip of two letters. They are noise on top of the
phrasing families and never families of their own.
"""

from __future__ import annotations

import random
import re

GREETINGS = {
    "en": [
        "Hi! ", "Hey, ", "Hello, ", "Hi MOSS, ", "Quick question: ", "hey ", "MOSS, ", "One more thing: ", "Ok so ",
        "Um, ",
    ],
    "zh": [
        "你好，", "请问", "请问，", "问一下，", "MOSS，", "帮我看看，", "嗨，", "想问下，", "麻烦问一下，", "那个，",
    ],
}  # fmt: skip
THANKS = {
    "en": [" Thanks!", " thx", " Thank you.", " Please help.", " pls", " Thanks in advance."],
    "zh": ["谢谢", "谢谢！", "，谢谢。", "多谢", "，急", "谢啦"],
}
POLITE = re.compile(r"(?i)(hi|hey|hello|please|thanks|thank|pls|moss|quick|so|ok)\b|请|你好|嗨|麻烦|谢|帮|劳驾|MOSS")
WORD = re.compile(r"\b[a-z]{5,}\b")
MARKS = re.compile(r"[\s,，、?？!！。;；'\"]|\.(?!\d)")


def _slip(rng: random.Random, text: str) -> str:
    """Two neighbouring letters inside one word change places."""
    words = list(WORD.finditer(text))
    if not words:
        return text
    at = rng.choice(words).start() + rng.randint(1, 3)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def casual(rng: random.Random, text: str, lang: str) -> str:
    """The question as somebody in a hurry, or somebody polite, may type it; most stay as they are."""
    draw = rng.random()
    if draw < 0.55:
        return text
    polite = POLITE.search(text) is not None
    if draw < 0.63 and not polite:
        greeting = rng.choice(GREETINGS[lang])
        if lang == "en" and not greeting.endswith("! ") and text[1:2].islower():
            text = text[0].lower() + text[1:]
        return greeting + text
    if draw < 0.69 and not polite:
        thanks = rng.choice(THANKS[lang])
        return (text.rstrip("。") if thanks.startswith("，") else text) + thanks
    if draw < 0.84:
        text = text.rstrip("?？.。 ") or text
        return text.lower() if lang == "en" and rng.random() < 0.5 else text
    if draw < 0.92:
        if lang == "en":
            return text.lower()
        return text.replace("，", rng.choice([" ", ",", "、"]), 1)
    if draw < 0.95 and lang == "en":
        return _slip(rng, text)
    return text


def plain(text: str) -> str:
    """One text for all the ways in which `casual` may type a question: no greeting or thanks, no punctuation, lower
    case, the letters of each word in alphabetical order. Made for comparing, not for reading.
    """
    text = text.lower()
    for lang in GREETINGS:
        opening = next((greeting.lower() for greeting in GREETINGS[lang] if text.startswith(greeting.lower())), "")
        ending = next((thanks.lower() for thanks in THANKS[lang] if text.endswith(thanks.lower())), "")
        text = text.removeprefix(opening).removesuffix(ending)
    text = re.sub("[a-z]+", lambda word: "".join(sorted(word[0])), text)
    return MARKS.sub("", text)

"""Words of texts in any script.

Scripts that put spaces between words give words. Those that do not (Han, kana, and the scripts of
Thailand, Laos, Cambodia and Myanmar) give characters with their marks, as the Unicode standard's
default word boundaries (UAX #29) do without a dictionary. Case and compatibility forms (composed or
decomposed, full or half width) make no difference, nor do invisible format characters.
"""

from __future__ import annotations

import string
import unicodedata

import regex

# Line_Break=SA: scripts whose words a program can only tell apart by a dictionary
_UNSPACED = (
    r"(?:[\p{Han}\p{Hiragana}\p{Bopomofo}\p{Yi}\p{Line_Break=SA}]"
    r"|(?=\p{Script_Extensions=Katakana})\p{L})"
)
_CHARACTER = rf"(?={_UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*"
_WORD = rf"(?:(?!{_UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*)+"
_WORDS = regex.compile(rf"{_CHARACTER}|{_WORD}")
_PIECES = regex.compile(rf"{_CHARACTER}|(?:(?!{_UNSPACED}).)+", regex.DOTALL)
# with the stroke that lengthens Arabic words
_INVISIBLE = regex.compile(r"[\p{Cf}\p{Variation_Selector}\u0640]")
_ZERO_WIDTH_SPACE = "\u200b"

_LIKE_APOSTROPHE = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u2010\u2011"))
_OTHER_PUNCTUATION = regex.compile(r"(?![\x00-\x7f])\p{P}")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = frozenset({"a", "an", "the"})


def _same_form(text: str) -> str:
    text = _INVISIBLE.sub("", text.replace(_ZERO_WIDTH_SPACE, " "))
    # folding may take a text out of its normal form
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits; of ASCII the same as rouge-score's without stemming."""
    return _WORDS.findall(_same_form(text))


def answer_words(text: str) -> list[str]:
    """What F1 counts: words without punctuation and English articles (SQuAD's, for ASCII).

    ASCII punctuation, curly apostrophes and hyphens are left out within a word (``don't`` is
    ``dont``); other punctuation ends one, since not every script has a space after it.
    """
    spaced = _OTHER_PUNCTUATION.sub(" ", text.translate(_LIKE_APOSTROPHE))
    plain = _same_form(spaced).translate(_ASCII_PUNCTUATION)
    return [piece for word in plain.split() if word not in _ARTICLES
            for piece in _PIECES.findall(word)]  # fmt: skip

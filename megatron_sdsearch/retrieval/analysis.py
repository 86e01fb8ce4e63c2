"""Text analysis like Lucene 8's, so that rankings equal those of Elasticsearch's ``standard`` and ``english`` fields.

Owns tokenization, stop words and stemming. Tested against terms produced by Lucene 8.7
(``tests/unit/retrieval/lucene_golden.json``). Known differences: malformed emoji sequences, keycaps, flags of regions,
and characters newer than Lucene's Unicode version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

import regex
from nltk.stem.porter import PorterStemmer

Analyzer = Callable[[str], list[str]]

MAX_TOKEN_LENGTH = 255
"""Characters; longer tokens are split into pieces of this length, as by Lucene's StandardTokenizer."""

# Lucene's EnglishAnalyzer.ENGLISH_STOP_WORDS_SET.
_STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
_STEMMER = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)
_POSSESSIVE = regex.compile(r"['\u2019\uFF07][sS]$")


def _word_pattern(*, letter: str, digit: str, kana: str, joiner: str, in_word: str, in_number: str) -> str:
    """Match words and numbers by Unicode's word-break rules (annex 29); each argument matches one character."""
    word = f"{letter}(?:(?:{joiner}*|{in_word}){letter})*"  # WB5-7
    number = f"{digit}(?:(?:{joiner}*|{in_number}){digit})*"  # WB8, WB11-12
    kana_run = f"{kana}(?:{joiner}*{kana})*"  # WB13
    piece = f"(?:{kana_run}|(?:{number}|{word})+)"  # WB9-10
    # A word starts at its first joiner: without the look-behind a long run of underscores takes quadratic time.
    return f"(?<!{joiner}){joiner}*{piece}(?:{joiner}+{piece})*{joiner}*"  # WB13a-b


def _unicode_pattern() -> str:
    """Match the words of annex 29, single ideographs and kana, and emoji.

    The annex leaves Han, kana and South-East Asian scripts to dictionaries; Lucene keeps runs of the latter.
    """
    ignored = r"[[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]--\p{Emoji_Modifier}]*+"  # WB4

    def one_of(members: str) -> str:
        return f"(?:[{members}]{ignored})"

    letter = one_of(r"\p{WB=ALetter}\p{WB=Hebrew_Letter}")
    hebrew = one_of(r"\p{WB=Hebrew_Letter}")
    hebrew_quoted = f"{hebrew}(?:{one_of(chr(39))}|{one_of(chr(34))}(?={hebrew}))"  # WB7a-c
    words = _word_pattern(
        letter=f"(?:{hebrew_quoted}|{letter})",
        digit=one_of(r"\p{WB=Numeric}"),
        kana=one_of(r"\p{WB=Katakana}"),
        joiner=one_of(r"\p{WB=ExtendNumLet}"),
        in_word=one_of(r"\p{WB=MidLetter}\p{WB=MidNumLet}\p{WB=Single_Quote}"),
        in_number=one_of(r"\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=Single_Quote}"),
    )
    south_east_asian = one_of(r"\p{LB=SA}") + "+"
    single = one_of(r"\p{Script=Han}\p{Script=Hiragana}")
    flag = one_of(r"\p{Regional_Indicator}") + "{2}"
    pictograph = r"[\p{Extended_Pictographic}\p{Emoji_Modifier}]"
    emoji = rf"(?:{pictograph}\p{{Emoji_Modifier}}?\uFE0F?\u200D)*{pictograph}\p{{Emoji_Modifier}}?{ignored}"
    return f"{words}|{south_east_asian}|{single}|{flag}|{emoji}"


# The same rules for ASCII, which most text is: several times faster.
_ASCII_TOKEN = re.compile(
    _word_pattern(letter="[A-Za-z]", digit="[0-9]", kana="(?!)", joiner="_", in_word="[:.']", in_number="[,;.']")
)
# ``regex`` supports Unicode's Word_Break property; ``re`` does not.
_TOKEN = regex.compile(_unicode_pattern(), flags=regex.VERSION1)


def analyze_standard(text: str) -> list[str]:
    """Return words in lower case (Elasticsearch's ``standard`` analyzer, which removes no stop words)."""
    return [_lower(token) for token in _tokens(text)]


def analyze_english(text: str) -> list[str]:
    """Return stems: possessives and stop words removed, lower case, Porter stemmer (Lucene's EnglishAnalyzer)."""
    words = (_lower(_POSSESSIVE.sub("", token)) for token in _tokens(text))
    return [_stem(word) for word in words if word not in _STOP_WORDS]


ANALYZERS: dict[str, Analyzer] = {"standard": analyze_standard, "english": analyze_english}
"""Functions from text to terms, by ``retrieval.analyzer``."""


def first_tokens(text: str, count: int) -> str:
    """Cut ``text`` after its ``count``-th token of the ``standard`` analyzer, if it has more."""
    pattern = _ASCII_TOKEN if text.isascii() else _TOKEN
    ends = (match.end() for match in pattern.finditer(text))
    return text[: next(islice(ends, count - 1, None), len(text))]


def _tokens(text: str) -> Iterator[str]:
    pattern = _ASCII_TOKEN if text.isascii() else _TOKEN
    for match in pattern.finditer(text):
        token = match.group()
        if len(token) <= MAX_TOKEN_LENGTH:
            yield token
        else:
            yield from _pieces(pattern, token)


def _pieces(pattern: re.Pattern[str] | regex.Pattern[str], token: str) -> Iterator[str]:
    # Lucene resumes after the longest token that fits, which a quote or a dot may have ended early.
    start = 0
    while start < len(token):
        piece = pattern.search(token[start : start + MAX_TOKEN_LENGTH])
        if piece:
            yield piece.group()
        start += piece.end() if piece else MAX_TOKEN_LENGTH


def _lower(token: str) -> str:
    if token.isascii():
        return token.lower()
    # Java lower-cases each code point to a single one: no final sigma, and a dotted capital I loses its dot.
    return "".join(character.lower()[0] for character in token)


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    # Words repeat: caching makes indexing several times faster.
    stem: str = _STEMMER.stem(word, to_lowercase=False)
    return stem

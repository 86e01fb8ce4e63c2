"""What is derived from records."""

from __future__ import annotations

import pytest

from megatron_sdsearch.records import bare_title


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ('"Canal"', "Canal"),
        ("Canal", "Canal"),
        ('"Weird Al" Yankovic', '"Weird Al" Yankovic'),
        ('The "Canal"', 'The "Canal"'),
        ('""Weird Al" Yankovic"', '"Weird Al" Yankovic'),
        ('"Salt "Old" Works"', 'Salt "Old" Works'),
        ('"A" and "B"', '"A" and "B"'),
        ('""A" and "B""', '"A" and "B"'),
        ('""Heroes""', '"Heroes"'),
        ('"Live ("Heroes")"', 'Live ("Heroes")'),
        ('"7" Single"', '7" Single'),
        ('"', '"'),
        ('""', ""),
        ('"Canal', '"Canal'),
        ("", ""),
    ],
)
def test_quotes_go_in_pairs_or_stay(line: str, title: str) -> None:
    assert bare_title(line) == title

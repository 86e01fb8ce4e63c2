"""The list of metrics says what each of them is."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_sdsearch.logging import names


def test_every_name_has_a_comment_with_its_meaning() -> None:
    source = Path(names.__file__).read_text()
    described = re.findall(r'((?:^#: .+\n)+)^([A-Z_0-9]+): Final = "', source, re.MULTILINE)
    assert [name for _, name in described] == [name for name in vars(names) if name.isupper()]


def test_every_name_stands_for_one_metric() -> None:
    values = [value for name, value in vars(names).items() if name.isupper()]
    assert len(values) == len(set(values))

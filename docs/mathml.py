"""Hook of mkdocs: turn the formulas of a page into MathML, which browsers draw without a script from elsewhere."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(html: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex has marked; a formula that cannot be read ends the build."""
    return _FORMULA.sub(_to_mathml, html)


def _to_mathml(match: re.Match[str]) -> str:
    tex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", unescape(match["tex"]))
    return str(convert(tex, display="block" if match["open"] == "[" else "inline"))

"""Reads the gold answers of question files: a string, a list, or a list converted to a string.

A column that went through CSV, ``str()`` or numpy holds ``"['A', 'B']"``. As a single answer it could never be matched
and every right answer would score 0, so it is parsed as a list, or refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

_CONTAINER = re.compile(r"(?:(?:np\.|numpy\.)?(?:array|list|tuple|set)\s*\(\s*)?[\[({].*[\])}]", re.DOTALL)
# Also matches lists that are refused because no parser here reads them: Series(['A']), frozenset({'A'}), b"['A']".
_BEGINS_AS_LIST = re.compile(
    r"""\[\s*(?:['"]|[\w.]+\()|(?:(?:np\.|numpy\.)?array|list)\s*\(\s*\[|[A-Za-z_][\w.]*\(\s*[\[{]\s*['"]|b['"]\s*\["""
)
_NUMBERS = re.compile(r"\[(?:[\s\d.,+-]|nan|inf)*\]", re.IGNORECASE)
_MAKERS = {"array", "list", "tuple", "set"}


def read_gold_answers(value: Any) -> Any:
    """Return a list of answers from a single answer, a list, or a list as a string; the caller validates the elements.

    A list with a list as its only element is unwrapped; a list among several elements is refused.

    Raises:
        PydanticCustomError: the value is neither a string nor a list, or its answers are ambiguous.
    """
    while isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str | list | tuple):
        value = value[0]
    if isinstance(value, str):
        return answers_in_text(value)
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("no_answers", "Should be a text or a list of texts")
    if any(_is_list_for_sure(element) for element in value):
        raise PydanticCustomError("list_in_list", "One of several gold answers is itself a list or an object")
    return value


#: At least one answer, none of them empty.
GoldAnswers = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(read_gold_answers)]


def answers_in_text(text: str) -> list[str]:
    """Parse a list printed by Python, JSON or numpy; any other text is one answer.

    Brackets alone do not make a list: ``[REC]`` and ``(500) Days of Summer`` are answers.

    Raises:
        PydanticCustomError: it looks like a list or an object, and its answers are ambiguous.
    """
    text = _unquoted(text.strip())
    if not _CONTAINER.fullmatch(text) and not _BEGINS_AS_LIST.match(text):
        return [text]
    value = _parse(text)
    if isinstance(value, list) and value and all(isinstance(element, str) for element in value):
        return value
    if isinstance(value, dict):
        raise PydanticCustomError("object_text", "Text of an object where gold answers are wanted")
    is_maybe_list = text[0] == "[" and (value is not None or "," in text or _NUMBERS.fullmatch(text))
    if is_maybe_list or _BEGINS_AS_LIST.match(text):
        raise PydanticCustomError(
            "list_text", "Looks like the text of a list, but its answers are not certain: give a list of texts"
        )
    return [text]


def _unquoted(text: str) -> str:
    """Decode a list that was encoded twice (``"\"['A']\""``) once; other texts keep their quotes."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        inner = ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    return inner.strip() if isinstance(inner, str) and _BEGINS_AS_LIST.match(inner.strip()) else text


def _is_list_for_sure(element: Any) -> bool:
    # In a list, an ambiguous text such as "[1905]" is an answer: the file has real lists.
    if not isinstance(element, str):
        return isinstance(element, list | tuple | dict)
    text = element.strip()
    if not _CONTAINER.fullmatch(text):
        return False
    value = _parse(text)
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(e, str) for e in value))


def _parse(text: str) -> list[Any] | dict[str, Any] | None:
    """Return a list (strings, and None for other elements), an object as ``{}``, or None if the text is neither."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _parse_python(text)
    if isinstance(value, dict):
        return {}
    return value[0] if len(value) == 1 and isinstance(value[0], list) else value


def _parse_python(text: str) -> list[Any] | dict[str, Any] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # invalid escape sequences
            node = ast.parse(text, mode="eval").body
            while isinstance(inner := _inside(node), ast.expr):
                node = inner
            if isinstance(node, ast.Dict):
                return {}
            return _elements(text, node) if isinstance(node, ast.List | ast.Tuple | ast.Set) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None


def _inside(node: ast.expr) -> ast.expr | None:
    """Return X of ``array(X, ...)``, and of ``[X]`` with a list X."""
    if isinstance(node, ast.Call) and _name(node.func) in _MAKERS and node.args:
        return node.args[0]
    if isinstance(node, ast.List) and len(node.elts) == 1:
        (only,) = node.elts
        is_list = isinstance(only, ast.List | ast.Tuple) or (isinstance(only, ast.Call) and _name(only.func) in _MAKERS)
        return only if is_list else None
    return None


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _elements(text: str, node: ast.List | ast.Tuple | ast.Set) -> list[Any] | None:
    """Return the elements: strings, and None for other constants; or None if one is not a constant."""
    elements = []
    for element in node.elts:
        if isinstance(element, ast.Call) and _name(element.func) == "str_" and len(element.args) == 1:
            element = element.args[0]  # np.str_('A')
        if not isinstance(element, ast.Constant):
            return None
        elements.append(element.value if isinstance(element.value, str) else None)
    # numpy writes no commas, and Python joins adjacent strings: ['A' 'B'] would become the single answer AB.
    tokens = tokenize.generate_tokens(io.StringIO(ast.get_source_segment(text, node) or "").readline)
    strings = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    num_strings = sum(element is not None for element in elements)
    if len(strings) == num_strings:
        return elements
    return strings if len(elements) == num_strings == 1 and isinstance(node, ast.List) else [None]

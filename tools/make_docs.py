"""Generate docs/tour.md (every file in one line) and docs/settings.md from the code.

    python tools/make_docs.py          # write them
    python tools/make_docs.py --check  # exit code 1 if they are out of date

A file is described by the first paragraph of its docstring, a setting by the docstring below its field.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.config.lookup import DROPPED, RENAMED

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_sdsearch"
_UNLIMITED = 2**31 - 1
"""Upper limits from here on only prevent an overflow of C's integers, so they are not shown."""
NOTICE = "<!-- Made by tools/make_docs.py from the code: change the code, then run `make docs-pages`. -->\n\n"


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    is_check, is_stale = parser.parse_args().check, False
    for name, text in {"tour.md": tour(), "settings.md": settings()}.items():
        page = ROOT / "docs" / name
        if page.is_file() and page.read_text() == text:
            continue
        if is_check:
            print(f"docs/{name} is out of date: run `make docs-pages`", file=sys.stderr)
            is_stale = True
        else:
            page.write_text(text)
    return int(is_stale)


def tour() -> str:
    """Build the page with every module and program in one line, from the top layer down."""
    lines = [
        "# A tour of the code\n\n",
        NOTICE,
        "At run time a module imports only modules below it on this page; import-linter enforces this in ",
        "`make check` ",
        "(`[tool.importlinter]` in `pyproject.toml`). The order of a training step is in `training/loop.py`: ",
        "start there.\n\n",
        "What calls what in a step: `training/loop.py` -> `training/rollouts.py` (which ranks roll out) -> ",
        "`rollout/collector.py` (groups) -> `rollout/episode.py` (one trajectory) -> an engine (`rollout/embedded.py` ",
        "or `sglang/engine.py`) and a search engine (`retrieval/`); then `hindsight/block.py`, `batching/samples.py`, ",
        "`batching/packing.py`, `training/updates.py`, `training/policy.py`, `parallel/schedule.py` and ",
        "`loss/objective.py`. `training/engines.py` starts engines, `sglang/publish.py` sends them the weights, and ",
        "`sglang/servers.py` restarts a server that died.\n",
    ]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    for module in (name.strip(" ()") for layer in layers for name in layer.replace(":", "|").split("|")):
        lines += _section(f"megatron_sdsearch/{module}", PACKAGE / module)
    lines += ["\n## Programs outside the package\n"]
    for folder in ("tools", "slurm", "docker", "examples"):
        lines += _section(folder, ROOT / folder)
    return "".join(lines)


def _section(title: str, path: Path) -> Iterator[str]:
    if path.with_suffix(".py").is_file():
        yield f"\n## `{title}.py`\n\n{_first_line(path.with_suffix('.py'))}\n"
        return
    intro = _first_line(path / "__init__.py") if (path / "__init__.py").is_file() else ""
    yield f"\n## `{title}/`\n\n" + (f"{intro}\n\n" if intro else "") + "| file | what it does |\n|---|---|\n"
    for file in sorted(path.rglob("*")):
        if file.suffix in (".py", ".sh") and file.name != "__init__.py":
            yield f"| `{file.relative_to(path)}` | {_first_line(file)} |\n"


def _first_line(file: Path) -> str:
    """Return the first paragraph of a module's docstring, or of a shell script's comments, on one line."""
    text = file.read_text()
    if file.suffix == ".sh":
        comment = re.search(r"^# (?!shellcheck).*(\n# .*)*", text, re.MULTILINE)
        paragraph = comment[0].replace("\n# ", " ").removeprefix("# ") if comment else ""
    else:
        paragraph = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("``", "`").replace("|", "\\|")


def settings() -> str:
    """Build the page with every setting, its type, its default and its description."""
    schema = RunConfig.model_json_schema()
    documentation = dict(_field_docstrings())
    lines = [
        "# Settings\n\n",
        NOTICE,
        "Written in YAML, or on the command line as `section.key=value`. `sdsearch check CONFIG` lists every ",
        "mistake.\n",
    ]
    lines += _table("", RunConfig, schema, documentation)
    lines += ["\n## Renamed\n\n| old name | name today |\n|---|---|\n"]
    lines += [f"| `{old}` | `{new}` |\n" for old, new in sorted(RENAMED.items())]
    lines += ["\n## Removed\n\n| setting | instead |\n|---|---|\n"]
    lines += [f"| `{name}` | {hint} |\n" for name, hint in sorted(DROPPED.items())]
    return "".join(lines)


def _field_docstrings() -> Iterator[tuple[tuple[str, str], str]]:
    """Yield (class, field) and the string below the field."""
    for file in sorted((PACKAGE / "config").glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for field, text in zip(node.body, node.body[1:], strict=False):
                if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                    continue
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    yield (node.name, field.target.id), " ".join(str(text.value.value).split())


def _table(
    prefix: str, section: type[BaseModel], schema: Mapping[str, Any], documentation: Mapping[tuple[str, str], str]
) -> Iterator[str]:
    """Yield the table of one section, then those of its subsections."""
    title = (
        f"\n## `{prefix.rstrip('.')}`\n\n{(section.__doc__ or '').splitlines()[0].replace('``', '`')}\n"
        if prefix
        else ""
    )
    yield title + "\n| setting | type | default | |\n|---|---|---|---|\n"
    inner: list[tuple[str, type[BaseModel]]] = []
    definition = schema if section is RunConfig else schema["$defs"][section.__name__]
    for name, field in section.model_fields.items():
        child = next((kind for kind in _types_in(field.annotation) if issubclass(kind, BaseModel)), None)
        if child is not None:
            inner.append((f"{prefix}{name}.", child))
            continue
        owner = next(cls.__name__ for cls in section.__mro__ if name in cls.__annotations__)
        default = "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
        text = documentation.get((owner, name), "").replace("``", "`").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_type_text(definition['properties'][name])} | {default} | {text} |\n"
    for name, child in inner:
        yield from _table(name, child, schema, documentation)


def _types_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _types_in(argument)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def _type_text(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type_text(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type_text(field['items'])}" if "items" in field else "list"
    text = {"object": "mapping", "string": "path" if field.get("format") == "path" else "text"}.get(
        field["type"], str(field["type"])
    )
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    shown = (f"{sign} {field[key]:,}" for key, sign in limits.items() if key in field and field[key] < _UNLIMITED)
    return " ".join([text, *shown])


if __name__ == "__main__":
    sys.exit(main())

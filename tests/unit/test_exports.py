"""What other projects import: the names exist, are typed, and load no more than they need."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import megatron_sdsearch

PACKAGE = Path(megatron_sdsearch.__file__).parent
NAMES = [name for name in megatron_sdsearch.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_the_documented_object_of_its_module(name: str) -> None:
    exported = getattr(megatron_sdsearch, name)
    assert exported.__doc__
    assert getattr(import_module(exported.__module__), name) is exported


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(NAMES)
    assert (PACKAGE / "py.typed").is_file()


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'vocab_parallel_kl'"):
        megatron_sdsearch.vocab_parallel_kl  # noqa: B018


def test_importing_the_package_loads_no_torch() -> None:
    program = (
        "import sys, megatron_sdsearch as package; package.load_config; dir(package); "
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

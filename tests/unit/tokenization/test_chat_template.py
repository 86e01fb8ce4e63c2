"""Chat templates: the run's date, arguments, and programs that fail."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.tokenization.renderer import Renderer
from tests.unit.conftest import CHAT_TEMPLATE, train_tokenizer

THINKING = (  # as Qwen3's: a thought that is closed before it begins
    CHAT_TEMPLATE.removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As Llama 3.2's: the date is a variable, which is today's where it is not given.
DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y, %H:%M") %}{% endif %}{% endif %}'
    "<|im_start|>system\nToday: {{ date_string }}<|im_end|>\n" + CHAT_TEMPLATE
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{% endif %}{% endfor %}"
)
CLOSED = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]


def render(template: str, text: str = "where?", **settings: Any) -> str:
    """The whole prompt, special tokens shown."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    return str(tokenizer.decode(list(Renderer(tokenizer, **settings).prompt_ids(text)), skip_special_tokens=False))


def test_the_date_is_the_runs_whatever_day_it_is() -> None:
    assert "Today: 05 Feb 2025, 00:00<|im_end|>" in render(DATED, run_date=date(2025, 2, 5))
    assert f"Today: {date.today():%d %b %Y}" in render(DATED)
    assert "Today: never<" in render(DATED, run_date=date(2025, 2, 5), arguments={"date_string": "never"})


def test_arguments_reach_the_template() -> None:
    assert render(THINKING).endswith("<|im_start|>assistant\n")
    assert render(THINKING, arguments={"enable_thinking": True}).endswith("<|im_start|>assistant\n")
    closed = render(THINKING, arguments={"enable_thinking": False})
    assert closed.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("enable_thinkin", "never reads it; did you mean enable_thinking?"),
        ("zzz", "never reads it; leave it out: it reads enable_thinking"),
        ("messages", "is set by the program"),
        ("add_generation_prompt", "is set by the program"),
        ("strftime_now", "is set by the program"),
        ("bos_token", "is set by the program or the tokenizer"),
    ],
)
def test_an_argument_that_would_do_nothing_or_harm_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.chat_template_arguments\.{name}: .*{reason.replace('?', '.')}"):
        render(THINKING, arguments={name: 1})


def test_arguments_without_arguments_and_without_a_template_are_refused() -> None:
    with pytest.raises(ConfigError, match="it takes no arguments"):
        render(CHAT_TEMPLATE, arguments={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"data\.chat_template_arguments.*the tokenizer has no chat template"):
        Renderer(train_tokenizer(has_template=False), arguments={"enable_thinking": False})


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ raise_exception('Only tools') }}",
            r"fails on one user message \(TemplateError: Only tools\)",
        ),
        ("{{ messages[0].content.parts.text }}", r"fails on one user message \(UndefinedError: .*parts"),
        ("{{ 1 / 0 }}", r"fails on one user message \(ZeroDivisionError: division by zero\)"),
        ("{{ messages[0].content + level }}", r"UndefinedError.*set its arguments in .* \(it reads level\)"),
        ("x\n{% if %}", r"cannot be read \(TemplateSyntaxError, line 2: Expected an expression"),
        ("hello", "shows the user's text 0 times instead of once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "shows the user's text 2 times instead of once"),
        (CLOSED, r"does not open the assistant's turn.*writes '<\|im_start\|>assistant\\n' before"),
    ],
)
def test_a_failing_template_is_one_error_with_its_own_message(template: str, reason: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^--model: the chat template of {tmp_path} .*{reason}") as caught:
        Renderer.from_folder(tmp_path, field="--model")
    assert caught.value.fix


def test_a_template_that_needs_no_header_is_taken() -> None:
    assert render(MISTRAL) == "[INST] where?[/INST]"


def test_several_templates_without_a_default_are_refused() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    with pytest.raises(ConfigError, match=r"cannot be read .*no default"):
        Renderer(tokenizer)
    tokenizer.chat_template["default"] = CHAT_TEMPLATE
    assert Renderer(tokenizer).prompt_ids("hi") == Renderer(train_tokenizer()).prompt_ids("hi")

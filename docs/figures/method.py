"""Draw docs/figures/method.svg: python docs/figures/method.py [--check]."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

TARGET = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 1000, 452
COLOURS = {  # fill, border
    "prompt": ("#eceff3", "#8a94a3"),
    "think": ("#f6f7f9", "#b6bec9"),
    "query": ("#ffe3bf", "#d97706"),
    "documents": ("#e3eefb", "#6b9bd1"),
    "right": ("#d9f2df", "#2f9e53"),
    "wrong": ("#fbdede", "#d64545"),
    "block": ("#fff6d9", "#c9a227"),
    "loss": ("#ede4fb", "#7a4fd1"),
}
SIBLINGS = [  # query 1, query 2, answer, outcome
    ("who wrote Dune", "Frank Herbert born", "Tacoma", "right"),
    ("Dune author city", "Dune filming city", "Budapest", "wrong"),
    ("Dune novel", "", "Arrakeen", "wrong"),
]


def text(x: float, y: float, content: str, *, size: int = 13, anchor: str = "middle", style: str = "") -> str:
    """A line of text with its baseline at y."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style}>{escape(content)}</text>'


def box(x: float, y: float, width: float, content: str, kind: str, *, height: float = 30) -> str:
    """A rounded box with one centred line."""
    fill, border = COLOURS[kind]
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{border}"/>'
    return frame + text(x + width / 2, y + height / 2 + 4.5, content)


def arrow(points: str) -> str:
    """A line with a head at its last point."""
    return f'<polyline points="{points}" fill="none" stroke="#4a5361" stroke-width="1.6" marker-end="url(#head)"/>'


def heading(x: float, y: float, content: str) -> str:
    """The title of a part of the figure."""
    return text(x, y, content, size=14, anchor="start", style='font-weight="600"')


def siblings() -> str:
    """The rollouts of one question, each with its outcome."""
    parts = [heading(20, 34, "1  G rollouts of one question: where was the author of Dune born?")]
    for number, (first, second, answer, outcome) in enumerate(SIBLINGS):
        y = 48 + 40 * number
        parts += [
            box(20, y, 58, "think", "think"),
            box(82, y, 148, first, "query"),
            box(234, y, 50, "docs", "documents"),
        ]
        if second:
            parts += [
                box(288, y, 58, "think", "think"),
                box(350, y, 148, second, "query"),
                box(502, y, 50, "docs", "documents"),
            ]
        mark = "✓" if outcome == "right" else "✗"
        parts.append(box(556 if second else 288, y, 128, f"{answer} {mark}", outcome))
    return "".join(parts)


def hindsight() -> str:
    """The block that is built from all of them."""
    parts = [heading(20, 204, "2  Hindsight: what all of them searched for, and how it ended")]
    fill, border = COLOURS["block"]
    parts.append(f'<rect x="20" y="216" width="664" height="82" rx="6" fill="{fill}" stroke="{border}"/>')
    for number, (first, second, _, outcome) in enumerate(SIBLINGS):
        label = "CORRECT:" if outcome == "right" else "INCORRECT:"
        line = f"{label} {first}" + (f" | {second}" if second else "")
        parts.append(text(34, 240 + 23 * number, line, anchor="start", style='font-family="monospace"'))
    parts.append(text(670, 288, "no reasoning, documents or answers", size=12, anchor="end", style='fill="#5b6472"'))
    return "".join(parts) + arrow("352,170 352,188")


def two_roles() -> str:
    """The same weights with and without the block in front of a rollout."""
    parts = [heading(20, 332, "3  One policy, two contexts, the same query tokens")]
    parts += [
        box(20, 344, 196, "hindsight + question", "block"),
        box(220, 344, 58, "think", "think"),
        box(282, 344, 148, "Dune author city", "query"),
        text(446, 363, "teacher: no gradient", anchor="start", style='fill="#5b6472"'),
        box(20, 404, 196, "question", "prompt"),
        box(220, 404, 58, "think", "think"),
        box(282, 404, 148, "Dune author city", "query"),
        text(446, 423, "student: learns", anchor="start", style='fill="#5b6472"'),
        '<line x1="356" y1="374" x2="356" y2="404" stroke="#d97706" stroke-width="2" stroke-dasharray="4 3"/>',
    ]
    return "".join(parts) + arrow("364,389 846,389 846,300")


def loss() -> str:
    """What the update minimises."""
    fill, border = COLOURS["loss"]
    lines = [
        ("4  Loss", 600),
        ("from the outcome of a rollout,", 400),
        ("GRPO: one advantage each", 600),
        ("+ alpha ·", 400),
        ("JSD(teacher ‖ student)", 600),
        ("at the query tokens,", 400),
        ("credit for every single query", 400),
    ]
    frame = f'<rect x="712" y="48" width="268" height="250" rx="8" fill="{fill}" stroke="{border}"/>'
    rows = "".join(
        text(846, 86 + 32 * number, line, size=14, style=f'font-weight="{weight}"')
        for number, (line, weight) in enumerate(lines)
    )
    return frame + rows + arrow("688,103 710,103")


def figure() -> str:
    """The whole drawing."""
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#4a5361"/></marker></defs>'
    )
    parts = [marker, f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>']
    parts += [siblings(), hindsight(), two_roles(), loss()]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" fill="#1d232c" aria-label="SD-Search in four steps">'
    )
    return head + "\n".join(parts) + "</svg>\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text() != figure())
    TARGET.write_text(figure())

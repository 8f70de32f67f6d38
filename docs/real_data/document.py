"""The document: numbers of `docs/real-data.json` in words, by the template beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).with_name("document.md.j2")


def render(numbers: Mapping[str, Any]) -> str:
    """Write docs/real-data.md from the numbers of docs/real-data.json."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  no HTML
    )
    environment.filters["thousands"] = lambda n: f"{n:,}"
    environment.filters["three"] = lambda values: ", ".join(str(v) for v in values)
    text: str = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**numbers)
    return text.strip() + "\n"

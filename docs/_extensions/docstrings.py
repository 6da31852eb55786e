"""Docstrings as they are written here, in Markdown: literal blocks after ``::`` become fenced ones, and double backticks single."""

import re
from typing import Any

from griffe import Extension, Object

# A paragraph that ends with `::`, and all that is indented further below it.
_LITERAL = re.compile(r"::\n\n((?:    .*\n|\n)+)", re.MULTILINE)


def to_markdown(text: str) -> str:
    """The same docstring; its sections stay as they are."""
    # In the pages of sections an example stands in the plural, and only then are its lines of >>> read as code.
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = _LITERAL.sub(lambda found: f":\n\n```python\n{_dedented(found[1])}\n```\n\n", f"{text}\n")
    return re.sub(r"(?<!`)``(?!`)", "`", text).rstrip()


def _dedented(block: str) -> str:
    return re.sub(r"^    ", "", block.rstrip(), flags=re.MULTILINE)


class Docstrings(Extension):
    """What mkdocstrings reads of the package."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)

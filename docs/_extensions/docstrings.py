"""Makes Markdown of the docstrings here.

``::`` and the block below it become a fence, double backticks single ones.
"""

import re
from typing import Any

from griffe import Extension, Object

# What ends a paragraph, and all that is indented below it. Sections have none of these.
_LITERAL = re.compile(r"::\n\n((?:    .*\n|\n)+)")


def to_markdown(text: str) -> str:
    """The same docstring; its sections stay as they are."""
    # griffe knows this section in the plural only, and reads >>> as code only in known sections.
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    # The first word before a colon is read as a type, and two of them as a tuple.
    text = re.sub(r"^( +\w+Error), (\w+Error):", r"\1 | \2:", text, flags=re.MULTILINE)
    text = _LITERAL.sub(
        lambda found: f":\n\n```python\n{_dedented(found[1])}\n```\n\n", f"{text}\n"
    )
    return re.sub(r"(?<!`)``(?!`)", "`", text).rstrip()


def _dedented(block: str) -> str:
    return re.sub(r"^    ", "", block.rstrip(), flags=re.MULTILINE)


class Docstrings(Extension):
    """What mkdocstrings reads of the package."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)

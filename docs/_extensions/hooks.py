"""What mkdocs does to single pages."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """``make bench`` writes BENCHMARKS.md at the root; its pictures are in this folder."""
    if page.file.src_uri == "models.md":
        page.meta["hide"] = ["toc"]  # which leaves room for a table of six columns
    if page.file.src_uri == "benchmarks.md":
        return ROOT.joinpath("BENCHMARKS.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return markdown


def on_post_page(output: str, *, page: Any, **kwargs: Any) -> str:
    """The language of a page decides which glyphs a browser takes for Chinese."""
    if page.file.src_uri.startswith("zh/"):
        return output.replace('<html lang="en"', '<html lang="zh-Hans"', 1)
    return output

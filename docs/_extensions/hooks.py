"""What mkdocs does to single pages.

The Chinese pages are a site of their own in the folder zh/ of the English one. mkdocs resolves no
link that leaves a site. Here such a link has a scheme, ``english:``, until its page is written.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHINESE = ROOT / "docs" / "zh"
ENGLISH = "english:"  # and then a path from the root of the English site
BOOSTS = {"how_do_i.md": 1.5, "hazards.md": 0.4, "benchmarks.md": 0.4}  # in a search
LINK = re.compile(r"\]\((?P<path>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **kwargs: Any) -> str:
    """``make bench`` writes BENCHMARKS.md at the root; its pictures are in this folder."""
    if page.file.src_uri == "models.md":
        page.meta["hide"] = ["toc"]  # which leaves room for a table of six columns
    if page.file.src_uri in BOOSTS:
        page.meta["search"] = {"boost": BOOSTS[page.file.src_uri]}
    if page.file.src_uri == "benchmarks.md":
        return ROOT.joinpath("BENCHMARKS.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return _mark_english(markdown, page.file.src_uri) if _is_chinese(config) else markdown


def on_page_context(context: Any, *, page: Any, config: Any, **kwargs: Any) -> None:
    """The switch of languages leads to the same page, where it is translated."""
    source = page.file.src_uri
    translated = source if (CHINESE / source).exists() else "index.md"
    english, chinese = (ENGLISH, "") if _is_chinese(config) else ("", "zh/")
    config.extra["alternate"] = [
        {"name": "English", "lang": "en", "link": english + _html(source)},
        {"name": "中文", "lang": "zh", "link": chinese + _html(translated)},
    ]


def on_post_page(output: str, *, page: Any, config: Any, **kwargs: Any) -> str:
    """The language of a page decides which glyphs a browser takes for Chinese."""
    if not _is_chinese(config):
        return output
    output = output.replace('<html lang="zh"', '<html lang="zh-Hans"', 1)
    return output.replace(f'="{ENGLISH}', '="' + "../" * (page.url.count("/") + 1))


def on_post_template(output: str, *, config: Any, **kwargs: Any) -> str:
    """The page for addresses that do not exist."""
    return output.replace(f'="{ENGLISH}', '="../')


def _is_chinese(config: Any) -> bool:
    return Path(config.docs_dir) == CHINESE


def _html(source: str) -> str:
    return re.sub(r"\.md$", ".html", source)


def _mark_english(markdown: str, source: str) -> str:
    """Mark the links of a Chinese page to files that are not in docs/zh/."""

    def marked(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("zh", source, "..", link["path"]))
        if path.startswith("zh/"):
            return link[0]
        return f"]({ENGLISH}{_html(path)}{link['anchor'] or ''})"

    return LINK.sub(marked, markdown)

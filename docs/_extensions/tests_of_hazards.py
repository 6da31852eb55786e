"""The tests that docs/hazards.md links to, as pages of the site.

In the repository these links lead to files of tests/. mkdocs has no pages of those: here each of
them becomes one, which has the source of the tests that are linked to.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[test\]\(\.\./(?P<file>tests/[\w/]+\.py)#(?P<name>\w+)\)")


def on_files(files: Any, *, config: Any, **kwargs: Any) -> Any:
    """Add the pages."""
    hazards = files.get_file_from_path("hazards.md")
    linked = defaultdict[str, set[str]](set)
    for link in LINK.finditer(hazards.content_string if hazards else ""):
        linked[link["file"]].add(link["name"])
    for file, names in linked.items():
        page = File.generated(config, file.replace(".py", ".md"), content=_page(file, names))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """On the site the links of the table lead to these pages."""
    if page.file.src_uri != "hazards.md":
        return markdown
    return LINK.sub(lambda link: f"[test]({link['file'][:-3]}.md#{link['name']})", markdown)


def _page(file: str, names: set[str]) -> str:
    source = (ROOT / file).read_text(encoding="utf-8")
    lines, page = source.splitlines(), ["---", "search: {exclude: true}", "---", f"# {file}"]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            code = "\n".join(lines[first - 1 : node.end_lineno])
            page += [f"## {node.name} {{#{node.name}}}", f"```python\n{code}\n```"]
    return "\n\n".join(["\n".join(page[:3]), *page[3:]])

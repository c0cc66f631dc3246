"""The pages of the documentation, and what is in them: links, headings, blocks of code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Those for users; decisions and benchmark results are records of their day."""
RECORDS: Final = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*/*.md")]
_FENCE: Final = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}: {self.text.strip().splitlines()[0][:60]}"


def blocks(language: str) -> list[Block]:
    """Every block of a language, of all pages."""
    return [
        Block(page, found[1], _unindented(found[2]))
        for page in PAGES
        for found in _FENCE.finditer(page.read_text())
        if found[1] == language
    ]


def commands() -> Iterator[tuple[Path, str]]:
    """Every command of the console blocks, with the page; continued lines as one."""
    for block in blocks("console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ").split(" #")[0].strip()
            if command and not line.startswith(" "):
                yield block.page, command


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def links(page: Path) -> list[str]:
    """The targets of a page's links that are not on the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not target.startswith(("http://", "https://"))]


def _unindented(text: str) -> str:
    indent = len(text) - len(text.lstrip(" "))
    return re.sub(rf"^ {{{indent}}}", "", text, flags=re.MULTILINE)

"""The code blocks of Markdown files, and their shell lines checked or run without a shell."""

import dataclasses
import re
import shlex
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Block:
    """language: the fence's info string.   line: of the fence, counted from 1."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page whose blocks must run, by its path in the checkout."""
    found = [
        *ROOT.glob("docs/**/*.md"),
        *(ROOT / name for name in ("README.md", "bench/README.md", "recipes/README.md")),
    ]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.exists())


def blocks(page: str) -> list[Block]:
    """All of them, also those that are code because they are indented: without a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    tokens = [token for token in MarkdownIt().parse(text) if token.type in ("fence", "code_block")]
    return [Block(page, token.map[0] + 1, token.info.strip(), token.content) for token in tokens]


def commands(block: Block) -> list[list[str]]:
    """The words of each shell line; lines that end in a backslash go on."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def check_script(words: list[str]) -> None:
    """python [-m pytest] FILE …: the file is there, and every option that is given occurs in it."""
    files = [word for word in words if word.endswith(".py")]
    assert files, f"no script in {words}"
    source = (ROOT / files[0]).read_text(encoding="utf-8")
    if "pytest" in words:
        return
    for word in words[words.index(files[0]) + 1 :]:
        option = word.split("=")[0]
        known = option == "--help" or f'"{option}"' in source
        assert known or not option.startswith("--"), f"{files[0]} has no option {option}"

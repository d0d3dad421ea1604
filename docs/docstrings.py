"""The package's docstrings as Markdown: an extension of griffe, which reads the sources for the API pages."""

import re

import griffe

# "Args:" alone, with entries below; and what has its text behind the colon, several to a line.
_ENTRIES = re.compile(r"(Args|Attributes|Exactly one of):$")
_LABEL = re.compile(r"(?:^|(?<=   ))(Args|Attributes|Returns|Raises|Saved for backward|Deterministic): ")
_ENTRY = re.compile(r"(?:^|(?<=   ))([\w*]+(?:, [\w*]+)*): ")
_CODE = re.compile(r"(`[^`]*`)")


def _escaped(text: str) -> str:
    """What would be Markdown or HTML, but between backticks, as it stands."""
    parts = _CODE.split(text)
    parts[::2] = [re.sub(r"([\\*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _split(pattern: re.Pattern, text: str, mark: str) -> list[str]:
    """The parts of `text` that begin with a match, its name in `mark`s; what is before the first is one, too."""
    starts = [match.start() for match in pattern.finditer(text)]
    parts = []
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        part = text[start:end].strip()
        name = pattern.match(part)
        rest = _escaped(part[name.end() :] if name else part)
        if part:
            parts.append(f"{mark}{name[1]}{mark}: {rest}" if name else rest)
    return parts


def _joined(lines: list[str]) -> list[str]:
    """Lines with those below them that are indented further, but for lists, in one."""
    joined: list[str] = []
    for line in lines:
        deeper = line.startswith(" ") and not line.lstrip().startswith("- ")
        if deeper and joined:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return joined


def _dedented(lines: list[str]) -> list[str]:
    return [line[4:] for line in lines]


def markdown(docstring: str) -> str:
    """A docstring in the house style: an equation or a sentence, paragraphs, entries under Args, then labelled sentences."""
    source, out = docstring.splitlines(), []
    while source:
        line = source.pop(0)
        if line.startswith("```"):
            fence = [line]
            while fence[-1] != "```" or len(fence) == 1:
                fence.append(source.pop(0))
            out += ["", *fence, ""]
            continue
        below = []
        while source and source[0].startswith("    "):
            below.append(source.pop(0))
        title = _ENTRIES.match(line)
        if title:
            out += ["", f"**{title[1]}**", ""]
            for entry in _joined(_dedented(below)):
                if entry.lstrip().startswith("- "):
                    out.append(f"    - {_escaped(entry.lstrip()[2:])}")
                else:
                    out += [f"- {part}" for part in _split(_ENTRY, entry, "`")]
            out.append("")
        elif _LABEL.search(line):
            out += ["", *(f"{part}\n" for part in _split(_LABEL, " ".join([line, *map(str.strip, below)]), "**"))]
        else:
            out += [_escaped(text) for text in _joined([line, *below])]
    return "\n".join(out).strip()


class HouseDocstrings(griffe.Extension):
    """Every docstring through `markdown` as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

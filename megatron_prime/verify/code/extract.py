"""Finds the program in a response."""

from __future__ import annotations

import re

MAX_CODE_CHARS = 200_000
"""Longer programs are refused."""
_FENCE = re.compile(r"```|^[ \t]*~~~+", re.MULTILINE)
_PYTHON_FENCE = re.compile(
    r"(?P<fence>```|^[ \t]*~~~+)[ \t]*(?:python3?|py3?)(?![\w.+-])", re.IGNORECASE | re.MULTILINE
)
_LANGUAGE = re.compile(r"[ \t]*[\w+#.-]*[ \t]*\n")


def extract_code(text: str) -> str | None:
    """The last block marked as Python, up to the next fence or the end; else the last closed block of any kind.

    Fences are three backticks, or three tildes at the beginning of a line. Of a block whose fence is indented, as in a
    list, every line loses as much of its indentation, as CommonMark has it (4.5, fenced code blocks).

    PRIME's released grader reads the last Python block in the same way; where there is none it runs the whole text,
    which is not done here.

    Args:
        text: the whole response.

    Returns:
        The code as it stands in the block, or None where there is none.
    """
    openings = list(_PYTHON_FENCE.finditer(text))
    if openings:
        opening = openings[-1]
        mark = opening.group("fence").strip()[0]
        closing = next((f for f in _FENCE.finditer(text, opening.end()) if f.group().strip()[0] == mark), None)
        code = text[opening.end() : closing.start() if closing else len(text)]
        first, newline, rest = code.partition("\n")
        return _outdented(rest, text, opening.start()) if newline and not first.strip() else code.lstrip(" \t")
    fences = list(_FENCE.finditer(text))
    if len(fences) < 2:
        return None
    last = 2 * (len(fences) // 2) - 2
    block = text[fences[last].end() : fences[last + 1].start()]
    language = _LANGUAGE.match(block)
    return _outdented(block[language.end() :], text, fences[last].start()) if language else block


def _outdented(code: str, text: str, fence: int) -> str:
    """Takes the indentation of a fence off every line of its block."""
    before = text[text.rfind("\n", 0, fence) + 1 : fence]
    size = len(before)
    if not size or before.strip():
        return code
    lines = code.split("\n")
    return "\n".join(line[min(size, len(line) - len(line.lstrip(" \t"))) :] for line in lines)

"""Finds the program in a response."""

from __future__ import annotations

import re

MAX_CODE_CHARS = 200_000
"""Longer programs are refused."""
_FENCE = "```"
_PYTHON_FENCE = re.compile(r"```[ \t]*(?:python3?|py3?)(?![\w.+-])", re.IGNORECASE)
_LANGUAGE = re.compile(r"[ \t]*[\w+#.-]*[ \t]*\n")


def extract_code(text: str) -> str | None:
    """The last block marked as Python, up to the next fence or the end; else the last closed block of any kind.

    PRIME's released grader reads the last Python block in the same way; where there is none it runs the whole text,
    which is not done here.

    Args:
        text: the whole response.

    Returns:
        The code as it stands in the block, or None where there is none.
    """
    openings = list(_PYTHON_FENCE.finditer(text))
    if openings:
        code = text[openings[-1].end() :].partition(_FENCE)[0]
        first, newline, rest = code.partition("\n")
        return rest if newline and not first.strip() else code.lstrip(" \t")
    parts = text.split(_FENCE)
    num_blocks = (len(parts) - 1) // 2
    if num_blocks == 0:
        return None
    block = parts[2 * num_blocks - 1]
    language = _LANGUAGE.match(block)
    return block[language.end() :] if language else block

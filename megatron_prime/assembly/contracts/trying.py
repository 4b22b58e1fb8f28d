"""How problems of a part of the user's own are said."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

_NUM_SHOWN = 3


def raised(where: str, error: Exception) -> str:
    """A line for a part that raised: what, and in which line of whose file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{where} raised {type(error).__name__}: {error}{place}; correct it"


def some(where: str, problems: Sequence[str], fix: str) -> list[str]:
    """The first few of one part's problems, as lines ``where: problem; fix``."""
    lines = [f"{where}: {problem}{fix}" for problem in problems[:_NUM_SHOWN]]
    if len(problems) > _NUM_SHOWN:
        lines.append(f"{where}: and {len(problems) - _NUM_SHOWN} more of this kind; correct these first")
    return lines

"""LiveCodeBench as it is published: ``code_generation_lite``'s ``test*.jsonl``."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from datetime import date, datetime
from typing import Any

from megatron_prime.data.row_formats import Question, Row
from megatron_prime.errors import DataError
from megatron_prime.evaluation.rows import code_question, livecodebench_wording

WINDOW = (date(2023, 5, 1), date(2024, 5, 31))
"""Contests that PRIME reports as LiveCodeBench v2; both days count."""


def read_livecodebench(row: Row, where: str) -> Question | None:
    """A problem with its public and private tests; None where its contest is outside of `WINDOW`."""
    try:
        day = datetime.fromisoformat(row["contest_date"]).date()
        if not WINDOW[0] <= day <= WINDOW[1]:
            return None
        tests = [*json.loads(row["public_test_cases"]), *_private_tests(row["private_test_cases"])]
        metadata = json.loads(row.get("metadata") or "{}")
        truth: dict[str, Any] = {
            "inputs": [test["input"] for test in tests],
            "outputs": [test["output"] for test in tests],
        }
        content = livecodebench_wording(row["question_content"], row["starter_code"])
    except (KeyError, TypeError, ValueError, zlib.error, binascii.Error, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{where}: no problem of LiveCodeBench's code_generation_lite: {error!r}") from error
    if metadata.get("func_name"):
        truth["fn_name"] = metadata["func_name"]
    return code_question(content, truth, statement=row["question_content"])


class _TextOnly(pickle.Unpickler):
    """Reads texts; a pickle that names any function or class is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module_name}.{global_name}")


def _private_tests(packed: str) -> list[dict[str, str]]:
    """JSON, or JSON in a pickle, compressed, in base64."""
    try:
        return json.loads(packed)
    except ValueError:
        text = zlib.decompress(base64.b64decode(packed, validate=True))
        return json.loads(_TextOnly(io.BytesIO(text)).load())

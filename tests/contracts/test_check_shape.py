"""`tools/check_shape.py` finds what is too long, tests that stand by no file, and long files without a test."""

from __future__ import annotations

from pathlib import Path

import check_shape
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for path, num_lines in (
        ("megatron_prime/room/short.py", 149),
        ("megatron_prime/room/long.py", 150),
        ("megatron_prime/room/parts/__init__.py", 3),
        ("tests/unit/room/test_long.py", 3),
        ("tests/unit/room/test_parts.py", 3),
        ("tools/tool.py", 3),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x = 1\n" * num_lines)
    return tmp_path


def findings(repository: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    status = check_shape.main([str(repository)])
    lines = capsys.readouterr().out.splitlines()
    assert (status == 1) == (len(lines) > 0 and "short enough" not in lines[0])
    return lines if status else []


def test_a_repository_in_which_tests_stand_by_their_files_is_in_order(repository, capsys) -> None:
    assert findings(repository, capsys) == []


def test_a_long_file_without_a_test_is_found(repository: Path, capsys) -> None:
    (repository / "tests/unit/room/test_long.py").unlink()
    assert findings(repository, capsys) == [
        "megatron_prime/room/long.py: 150 lines and no tests/unit/room/test_long.py"
    ]


def test_a_test_of_nothing_is_found(repository: Path, capsys) -> None:
    (repository / "tests/unit/room/test_others.py").write_text("x = 1\n")
    assert findings(repository, capsys) == [
        "tests/unit/room/test_others.py: there is no megatron_prime/room/others.py; name it by what it tests"
    ]


def test_files_and_functions_have_a_budget(repository: Path, capsys) -> None:
    (repository / "tools/tool.py").write_text("x = 1\n" * 401)
    (repository / "tests/unit/room/test_long.py").write_text("def f():\n" + "    x = 1\n" * 70)
    assert findings(repository, capsys) == [
        f"{repository}/tests/unit/room/test_long.py:1: f has 71 lines; 70 at the most",
        f"{repository}/tools/tool.py: 401 lines; 400 at the most",
    ]

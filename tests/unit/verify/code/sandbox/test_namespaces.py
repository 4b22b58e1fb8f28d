"""What a program's process is, sees and may change, in every isolation and for every kind of user."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from code_cases import status_of

from megatron_prime.verify.code.sandbox import namespaces

ROOT = Path(__file__).parents[4]
UNCHANGED = """
import os
before = [os.fstat(n).st_mode for n in range(3)]
for n in range(3):
    os.fchmod(n, 0)
    os.utime(n, (0, 0))
print([os.fstat(n).st_mode for n in range(3)] == before, os.fstat(2).st_mtime > 0)
"""
MANY_THREADS = """
import threading
threading.stack_size(1 << 15)
event, count = threading.Event(), 0
try:
    while count < 200:
        threading.Thread(target=event.wait, daemon=True).start()
        count += 1
except RuntimeError:
    pass
print(count < 40, flush=True)
import os
os._exit(0)
"""
SEES = "import os, sys\nprint(any(os.path.exists(p + '/pyproject.toml') for p in sys.path), os.getuid() != 0)"


def _prints(output):
    return {"inputs": [""], "outputs": [output]}


@pytest.fixture(params=["fork_server", "bubblewrap"])
def launcher(request):
    return request.getfixturevalue(request.param)


def test_what_standard_streams_point_to_cannot_be_changed(launcher):
    assert status_of(launcher, _prints("True True"), UNCHANGED) == "pass"


def test_threads_are_limited(launcher):
    assert status_of(launcher, _prints("True"), MANY_THREADS) == "pass"


def test_a_program_sees_no_project_and_is_not_root(launcher):
    assert status_of(launcher, _prints("False True"), SEES) == "pass"


def test_files_can_be_copied_all_the_same(launcher):
    code = "import shutil\nopen('a', 'w').write('7')\nshutil.copy('a', 'b')\nprint(open('b').read())"
    assert status_of(launcher, _prints("7"), code) == "pass"


def test_folders_of_path_files_are_not_mounted(monkeypatch, tmp_path):
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "project"), str(ROOT)])
    folders = namespaces.library_folders()
    assert folders and not {str(tmp_path / "project"), str(ROOT)} & set(folders)
    mounted = namespaces.python_files()
    assert not any(Path(path).is_relative_to(tmp_path) or path == str(ROOT) for path in mounted)
    assert any(path in mounted for path in folders)


ATTEMPT = """
import sys
from megatron_prime.verify.code.judge import Limits, judge
from megatron_prime.verify.code.problem import OutputTests
from megatron_prime.verify.code.sandbox.launch import SandboxError
from megatron_prime.verify.code.worker import make_launcher
try:
    launcher = make_launcher(sys.argv[1], 2**30)
except SandboxError as error:
    print("refused:", error)
    raise SystemExit
for code in sys.argv[2:]:
    print(judge(launcher, Limits(5.0, 20.0), OutputTests([""], ["True True"]), code)[0])
launcher.close()
"""


def _attempt(drop, isolation):
    """What programs come to in a process of root that lacks capabilities."""
    if os.geteuid() != 0 or shutil.which("capsh") is None:
        pytest.skip("needs root and capsh")
    programs = [UNCHANGED, MANY_THREADS.replace("40,", "40, True,"), SEES.replace("print(any", "print(not any")]
    inner = [
        "capsh",
        f"--drop={drop}",
        "--",
        "-c",
        'exec "$@"',
        "sh",
        sys.executable,
        "-c",
        ATTEMPT,
        isolation,
        *programs,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(inner, capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout.strip().splitlines()


def test_root_without_the_right_to_make_namespaces_uses_those_of_users(fork_server):
    assert _attempt("cap_sys_admin", "fork_server") == ["pass"] * 3


def test_programs_are_refused_where_they_would_be_root(fork_server):
    (line,) = _attempt("all", "fork_server")
    assert line.startswith("refused: programs would run as root")

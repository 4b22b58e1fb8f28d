import shutil

import pytest

from megatron_prime.verify.code.sandbox.launch import SandboxError
from megatron_prime.verify.code.worker import make_launcher


@pytest.fixture(scope="session")
def fork_server():
    """A fork server in namespaces, the isolation that most tests are about."""
    try:
        launcher = make_launcher("fork_server", 2**30)
    except SandboxError as error:
        pytest.skip(f"no namespaces on this machine: {error}")
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def bubblewrap():
    if shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap: install the package bubblewrap")
    try:
        launcher = make_launcher("bubblewrap", 2**30)
    except SandboxError as error:
        pytest.skip(f"bubblewrap cannot wall programs in here: {error}")
    yield launcher
    launcher.close()

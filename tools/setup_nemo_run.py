"""Installs NeMo-Run in an environment of its own, `nemo-run` inside this interpreter's, that sees everything of it.

NeMo-Run imports leptonai, which holds starlette, anyio, httpx and urllib3 to versions that vLLM does not run with. So
its packages go into a folder that only its own interpreter looks into first: `.venv/nemo-run/bin/python -m
megatron_prime launch nemo-run ...`, or an example. The tasks that it starts run there too.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PACKAGES = ("nemo-run==0.11.1", "leptonai<0.28")
FOLDER = Path(sys.prefix) / "nemo-run"


def site_packages(python: Path) -> Path:
    """Where an interpreter installs packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def main() -> None:
    """Makes the environment and proves that NeMo-Run can be imported in it."""
    venv.create(FOLDER, with_pip=True, clear=True)
    python = FOLDER / "bin" / "python"
    outer = sysconfig.get_path("purelib")
    (site_packages(python) / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    subprocess.run([python, "-m", "pip", "install", *PACKAGES], check=True)
    # NeMo-Run starts it by name, and the outer one's ranks would not find NeMo-Run.
    torchrun = FOLDER / "bin" / "torchrun"
    torchrun.write_text(f"#!{python}\nfrom torch.distributed.run import main\n\nmain()\n")
    torchrun.chmod(0o755)
    check = "import nemo_run, torch, megatron_prime; print('NeMo-Run', nemo_run.__version__, 'is ready')"
    subprocess.run([python, "-c", check], check=True)


if __name__ == "__main__":
    main()

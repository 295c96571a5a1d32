"""Packaging of transform_ckpt.

Ranges here say what the code can live with; constraints.txt pins the one set that is tested (`make venv`).
The base install stays small: no framework is needed to convert, only to compare with.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "transform_ckpt" / "version.py").read_text(encoding="utf-8").split('VERSION = "')[1].split('"')[0]
BASE = [
    "numpy>=1.24,<3",
    "pyyaml>=6.0",
    "click>=8.1",
    "xxhash>=3.4",
    "ml_dtypes>=0.4",
    "isal>=1.5; platform_machine in 'x86_64 AMD64 aarch64 arm64'",
    "rich>=13.0",
]

EXTRAS = {
    "mindspore": ["mindspore>=2.7,<2.11", "protobuf>=4.25", "safetensors>=0.4.3,<0.8"],
    "mindformers": ["mindformers>=1.9,<1.10"],
    "torch": ["torch>=2.4"],
    "megatron": ["torch>=2.4", "megatron-core>=0.12"],
    "hf": ["transformers>=4.51", "safetensors>=0.4.3", "accelerate>=1.0", "peft>=0.13"],
    "remote": ["fsspec>=2024.6", "s3fs>=2024.6"],
    "test": [
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "pytest-timeout>=2.3",
        "pytest-benchmark>=5.0",
        "hypothesis>=6.100",
        "safetensors>=0.4.3,<0.8",
        "moto[server]>=5.0",
        "psutil>=5.9",
    ],
    "dev": [
        "ruff>=0.12",
        "mypy>=1.11",
        "import-linter>=2.1",
        "types-protobuf>=5.0",
        "types-pyyaml>=6.0",
    ],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="transform_ckpt",
    version=VERSION,
    description="Convert large-model training checkpoints between formats, frameworks and parallel layouts",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["transform_ckpt", "transform_ckpt.*", "strategy", "strategy.*"]),
    package_data={"transform_ckpt": ["py.typed"], "strategy": ["py.typed"]},
    include_package_data=False,
    package_dir={"": "."},  # editable installs become one path line: no import hook at every start
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["transform-ckpt = transform_ckpt.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

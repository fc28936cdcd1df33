"""Packaging. `kernels/` is a source root: the import package in it is `bio_kernels`, and none is called `kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "kernels/bio_kernels/__init__.py").read_text()).group(1)

TRITON = 'triton>=3.6,<3.8; platform_system == "Linux"'
BENCH = [TRITON, "pytest>=8.3", "pytest-benchmark>=5.1"]
TRAIN = ["accelerate>=1.10", "safetensors>=0.5", "huggingface_hub>=0.30", "tensorboard>=2.18", "tqdm>=4.66"]
TRAIN += ["psutil>=5.9"]
EXPERIMENTS = [*TRAIN, "hydra-core>=1.3.2", "torchmetrics>=1.6"]
DATA = ["tokenizers>=0.21", "datasets>=3.0"]
PLOT = ["matplotlib>=3.9"]
TEST = [*BENCH, "hypothesis>=6.100", *EXPERIMENTS, *PLOT]

setup(
    name="bio-kernels",
    version=VERSION,
    description="Triton kernels for sparse neuron interaction, and two models that live on them: SPROUT and BioHama",
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": ".", "bio_kernels": "kernels/bio_kernels"},
    packages=["bio_kernels", *find_packages(include=["sprout", "sprout.*", "biohama", "biohama.*"])],
    package_data={"bio_kernels": ["py.typed"], "sprout": ["py.typed"], "biohama": ["py.typed"]},
    install_requires=["torch>=2.11,<2.14", "numpy>=1.26"],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "train": [*TRAIN, *PLOT],
        "experiments": [*EXPERIMENTS, *PLOT],
        "data": DATA,
        "all": sorted({*TEST, *BENCH, *EXPERIMENTS, *DATA, *PLOT}),
    },
    entry_points={
        "console_scripts": ["sprout-train=sprout.train:main", "sprout-analyze=sprout.analyze:main"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

"""Packaging of ivr_jax; tool settings stand in pyproject.toml.

The experiment files of `configs/` are installed as `ivr_jax/configs`, so that `--config=micro_sft` works without the
source tree.  Lower bounds are the versions that the tests were run with.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"

REQUIREMENTS = [  # what `train` and `generate` need; everything else is an extra
    "absl-py>=2.5.1",
    "array_record>=0.8.6",
    "clu>=0.0.12",
    "etils[epath]>=1.15.0",
    "flax>=0.12.8",
    "fsspec>=2026.9.0",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "Jinja2>=3.1.6",
    "MarkupSafe>=3.0.3",
    "ml-collections>=1.1.0",
    "ml_dtypes>=0.5.4",
    "numpy>=2.4.6",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "Pillow>=13.0.0",
    "PyYAML>=6.0.3",
    "rich>=15.0.0",
    "safetensors>=0.8.0",
    "tensorboardX>=2.6.5",
    "tensorstore>=0.1.86",
    "tiktoken>=0.14.0",
    "tqdm>=4.70.1",
]
EXTRAS = {
    # construction and judges through OpenAI-compatible services
    "services": [
        "aiohttp>=3.13.0",
        "aiolimiter>=1.3.0",
        "httpx2>=2.16.2",  # the HTTP library that openai brings
        "openai[aiohttp]>=3.54.0",
        "tenacity>=9.2.1",
    ],
    # checkpoints in gs:// (through Orbax), and files of more than 512 MiB in both kinds of bucket
    "buckets": ["gcsfs>=2026.10.1", "google-cloud-storage>=3.17.1", "s3fs>=2026.9.0"],
    "report": ["matplotlib>=3.11.2"],  # plots of `report`, `evaluate` and `reproduce`
    "detector": ["torch>=2.13.0", "transformers>=5.23.0"],  # objects and colours of GenEval
    "benchmarks": ["pyarrow>=22.0.0"],  # prompt files that are published as Parquet
    "convert": ["transformers>=5.23.0"],  # logits of an export compared with transformers (with torch)
    "tfds": [  # tables are written and read without TensorFlow; only `tfds.load` needs it
        "importlib_resources>=7.1.0",  # tensorflow-datasets imports it and does not declare it
        "tensorflow-datasets>=4.9.10",
    ],
    "ray": ["ray>=2.60.0"],  # construction, judges and tokenising over the machines of a cluster
    "review": ["starlette>=1.10.0", "uvicorn>=0.54.0"],  # the local page of `python -m ivr_jax.review`
    "serve": ["prometheus_client>=0.26.0", "python-multipart>=0.0.20", "starlette>=1.10.0", "uvicorn>=0.54.0"],
}
# Everything but PyTorch, which a user brings in the build that fits the machine.
ALL = sorted({line for name, lines in EXTRAS.items() if name != "detector" for line in lines})
DOCS = ["mkdocs-material>=9.8.2,<10", "mkdocstrings[python]>=1.0.8"]
TEST = [
    *ALL,
    *DOCS,
    "axe-playwright-python>=0.1.8",  # ships axe-core, the accessibility rules of the browser tests
    "dashscope>=2.0.2",  # the public tokenizer and ranks that Emu3.5's are compared with
    "gcp-storage-emulator>=2026.7.19",  # buckets of the tests; moto's server for S3
    "hypothesis>=6.170.15",
    "ipykernel>=7.4.0",
    "moto[server]>=5.2.5",
    "mypy>=2.4.1,<3",
    "nbclient>=0.11.0",
    "playwright>=1.65.2",  # drives the Chromium that is installed; it downloads none
    "pytest>=9.2.0",
    "pytest-cov>=7.1.0",
    "pytest-xdist>=3.8.0",
    "ruff>=0.17.6,<0.18",  # a new minor version may bring new rules
    "scikit-image>=0.26.0",  # ships the photographs that the tests train on
    "scikit-learn>=1.9.1",  # the reference for agreement between reviewers
    "torch==2.13.0",  # the independent implementation that exports are compared with; runs on a CPU
    "trl>=1.16.0,<1.17",  # its GRPO trainer is the independent reference of the objective; the tests call its methods
    "types-PyYAML",
    "types-tqdm",
]
COMMANDS = {
    "ivr-train": "ivr_jax.train",
    "ivr-construct": "ivr_jax.construct.__main__",
    "ivr-generate": "ivr_jax.generate.__main__",
    "ivr-evaluate": "ivr_jax.evaluate.__main__",
    "ivr-convert": "ivr_jax.convert.__main__",
    "ivr-demo": "ivr_jax.demo.__main__",
    "ivr-reproduce": "ivr_jax.reproduce.__main__",
    "ivr-report": "ivr_jax.report.__main__",
    "ivr-export": "ivr_jax.export.__main__",
    "ivr-review": "ivr_jax.review.__main__",
    "ivr-score": "ivr_jax.score.__main__",
    "ivr-serve": "ivr_jax.serve.__main__",
    "ivr-inspect": "ivr_jax.inspect.__main__",
    "ivr-tokenise": "ivr_jax.tokenise.__main__",
    "ivr-compile": "ivr_jax.compile.__main__",
}


def version() -> str:
    """`__version__` of the package, read without importing it."""
    source = (HERE / "ivr_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


setup(
    name="ivr_jax",
    version=version(),
    description="Interleaved visual reasoning in JAX: one model that draws, judges what it drew, and draws again.",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["ivr_jax", "ivr_jax.*"]), "ivr_jax.configs"],
    package_dir={"ivr_jax.configs": "configs"},
    package_data={
        "ivr_jax": ["py.typed"],
        "ivr_jax.checkpoints": ["micro/*"],
        "ivr_jax.services": ["prompts/*.txt"],
        "ivr_jax.review": ["page/*"],
        "ivr_jax.serve": ["page/*"],
        "ivr_jax.report": ["live_page/*", "templates/*"],
        "ivr_jax.demo": ["prompts.jsonl"],
        "ivr_jax.evaluate.benchmarks": ["prompts/*.txt"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        **EXTRAS,
        "all": ALL,
        "docs": DOCS,
        "test": TEST,
        "tpu": ["jax[tpu]>=0.10.2"],
        "tpu-aot": ["libtpu>=0.0.52"],  # the TPU compiler alone, for ivr_jax.compile
        "gpu": ["jax[cuda13]>=0.10.2"],
    },
    entry_points={"console_scripts": [f"{name} = {module}:entry" for name, module in COMMANDS.items()]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

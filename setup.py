"""Package metadata; see README.md for what each dependency is for."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Recipes, DeepSpeed configs and recorded curves lie where a clone shows them, and are data of the package where it is installed.
SHIPPED = {
    "vlmo_ds.recipes": "launch/recipes",
    "vlmo_ds.ds_configs": "ds_configs",
    "vlmo_ds.references": "launch/references",
}

# Lower bounds also keep pip from going years back where two packages hold others (s3fs and moto hold botocore).
CAPTIONING = ["pycocoevalcap", "nltk"]  # scores of captions: BLEU, ROUGE-L, CIDEr; words without Java
MLFLOW = [
    "mlflow-skinny>=3",
    "sqlalchemy>=2",
    "alembic>=1.13",
]  # the latter two for sqlite:///, its store without a server
VERSION = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("vlmo_ds").joinpath("__init__.py").read_text())[1]

setup(
    name="vlmo_ds",
    version=VERSION,
    description="Pretraining of vision-language mixture-of-modality-experts transformers under DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["vlmo_ds", "vlmo_ds.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "vlmo_ds": ["py.typed"],
        "vlmo_ds.recipes": ["*.yaml", "*/*.yaml"],
        "vlmo_ds.ds_configs": ["*.json"],
        "vlmo_ds.references": ["*.json"],
    },
    entry_points={"console_scripts": ["vlmo = vlmo_ds.__main__:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.3",
        "transformers>=4.50",
        "tokenizers",
        "fsspec>=2024.6",
        "huggingface_hub",
        "ftfy",
        "webdataset>=0.2.100",
        "braceexpand",
        "tensorboard",
        "safetensors",
        "pyyaml",
        "psutil",
        "pillow",
        "simplejpeg",
        "numpy",
        "scipy",
        "pydantic>=2",
        "tqdm",
    ],
    extras_require={
        "arrow": ["pyarrow>=15"],
        "captioning": CAPTIONING,
        "mlflow": MLFLOW,
        "s3": ["s3fs>=2024.6"],
        "test": [
            "pytest",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
            "pyarrow>=15",
            "s3fs>=2024.6",
            "moto[server]>=5",
            *MLFLOW,
            *CAPTIONING,
        ],
    },
)

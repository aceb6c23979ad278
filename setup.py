"""Package metadata; see README.md for what each dependency is for."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vlmo_ds",
    version="0.1.0",
    description="Pretraining of vision-language mixture-of-modality-experts transformers under DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["vlmo_ds", "vlmo_ds.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.3",
        "transformers>=4.50",
        "tokenizers",
        "huggingface_hub",
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
    extras_require={"arrow": ["pyarrow"], "test": ["pytest", "ruff", "pyarrow"]},
)

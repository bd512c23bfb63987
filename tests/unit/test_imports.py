"""Imports go one way (architecture.md §2): read from the syntax trees, so that imports inside functions count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [{"config", "schema", "errors", "safety", "html", "hashing", "network", "host_facts", "bundle"}, {"tokenizer", "data", "ops"},
          {"model"}, {"objectives", "decoding"}, {"training"}, {"evaluation", "serving", "rl", "data_pipeline"}, {"job"},
          {"start", "doctor"}, {"launch"}]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(path for folder in ("gpr_dist", "data_pipeline", "launch") for path in (ROOT / folder).rglob("*.py"))
WITHIN_ROOT = {("schema", "config"), ("schema", "errors"), ("config", "errors"), ("hashing", "errors"),
               ("bundle", "config"), ("bundle", "errors"), ("bundle", "schema"), ("bundle", "safety"), ("schema", "safety"),
               ("config", "safety"), ("errors", "safety"), ("host_facts", "network"), ("network", "errors")}
ONLY_IN = {"deepspeed": "gpr_dist/training/engine.py", "wandb": "gpr_dist/training/tracker.py"}


def part_of(module: str) -> str | None:
    """gpr_dist.data.loader -> data; data_pipeline.build -> data_pipeline; other packages -> None."""
    names = module.split(".")
    if names[0] == "gpr_dist":
        return names[1] if len(names) > 1 else None
    return names[0] if names[0] in LEVEL else None


def imports(source: str) -> set[str]:
    """Absolute names of the modules a file imports anywhere; `from gpr_dist import data` counts as gpr_dist.data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "gpr_dist" else {node.module}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)}
    return found


def problems(name: str, source: str) -> list[str]:
    """What the file `name`, relative to the repository, imports and should not."""
    here = part_of(name.removesuffix(".py").replace("/", "."))
    out = []
    for module in imports(source):
        package, part = module.split(".")[0], part_of(module)
        if package in ONLY_IN and name != ONLY_IN[package]:
            out.append(f"{name} imports {package}: only {ONLY_IN[package]} may")
        allowed = part is None or part == here or (here, part) in WITHIN_ROOT or (part in LEVEL and LEVEL[part] < LEVEL[here])
        if here == "data_pipeline" and part not in (None, here):
            allowed = part in LAYERS[0] | {"tokenizer"}
        if not allowed or (package == "launch" and here != "launch"):
            out.append(f"{name} imports {module}: {here} may not see {part}")
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_from_below_only(path):
    assert problems(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("name", "source"), [
    ("gpr_dist/model/gpr.py", "def f():\n    import gpr_dist.training"), ("gpr_dist/data/loader.py", "import gpr_dist.ops.rotary"),
    ("gpr_dist/data/loader.py", "from gpr_dist import model"), ("gpr_dist/training/loop.py", "import deepspeed"),
    ("launch/pretrain.py", "from wandb import init"), ("data_pipeline/build.py", "from gpr_dist.data import reader"),
    ("gpr_dist/evaluation/evaluate.py", "import launch.pretrain"), ("gpr_dist/evaluation/evaluate.py", "import data_pipeline.build"),
    ("gpr_dist/errors.py", "import gpr_dist.config"), ("gpr_dist/objectives/mtp.py", "importlib.import_module('deepspeed')"),
])
def test_the_rule_finds_offenders(name, source):
    assert len(problems(name, source)) == 1


def test_every_part_has_a_place_in_the_order():
    assert len(FILES) > 40 and {part_of(p.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", ".")) for p in FILES
                                if p.name != "__init__.py"} <= LEVEL.keys()

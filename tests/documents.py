"""What README.md and PAPER.md say about the code, as data: references such as `gpr_dist/model/gpr.py:GPR.forward`, and which hold."""

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = re.compile(r"`([\w./-]+\.py)(::?)([\w.]+)`")


@cache
def definitions(path: Path) -> frozenset[str]:
    """Names a module defines: functions, classes, `Class.method`, `Class.field`, and module-level variables."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names |= _defined(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for member in node.body for name in _defined(member)}
    return frozenset(names)


def references(text: str) -> list[tuple[str, str, str]]:
    """(path, ":" or "::", name) of every reference in backticks."""
    return REFERENCE.findall(text)


def broken_references(text: str) -> list[str]:
    """References whose file or name does not exist, and `path::name` that pytest would not collect."""
    broken = []
    for path, separator, name in references(text):
        is_test = Path(path).name.startswith("test_") and name.startswith("test_")
        exists = (ROOT / path).is_file() and name in definitions(ROOT / path)
        if not exists or (separator == "::") != is_test:
            broken.append(f"{path}{separator}{name}")
    return broken


def launch_module(name: str) -> ModuleType:
    """A script of launch/ as a module, as Python finds it when the script is run: with its neighbours in reach."""
    if (folder := str(ROOT / "launch")) not in sys.path:
        sys.path.append(folder)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}

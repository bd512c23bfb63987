"""Strict configuration: field default < YAML file < dotted command-line override.

Every part owns a small frozen `Config` subclass beside its code; a job's config only nests them. Unknown keys stop the run and
name the nearest valid key. YAML holds values, Python holds logic.
"""

import argparse
import contextlib
import difflib
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from gpr_dist.errors import ConfigError
from gpr_dist.safety import redacted


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys forbidden, defaults validated too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def load_config(cls: type[C], path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> C:
    """Build `cls` from a YAML file and `a.b=value` overrides (values are parsed as YAML scalars).

    Raises: ConfigError listing every problem at once.
    """
    values = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    origin = [str(path)] if path else []
    return build_config(cls, values, where=" with ".join([*origin, "command line"] if overrides or not path else origin))


def build_config(cls: type[C], values: dict[str, Any], where: str) -> C:
    """Validate a plain dictionary; `where` names its origin in the error message. Raises: ConfigError."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = [_explain(cls, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def public(config: Config) -> dict[str, Any]:
    """Plain values of the resolved config for files, logs and trackers: without the credentials that a URI may carry (safety.redact)."""
    return redacted(config.model_dump(mode="json"))


def to_yaml(config: Config) -> str:
    """`public` as YAML that `load_config` reads back to an equal object, but for credentials."""
    return yaml.safe_dump(public(config), sort_keys=False)


def parse_cli(cls: type[C], description: str, default_config: str | Path | None = None, argv: list[str] | None = None,
              flags: dict[str, str] | None = None, words: str | None = None) -> tuple[C, argparse.Namespace]:
    """Command line of every `launch/*.py`: `--config FILE`, `--dry-run`, `--help`, dotted overrides, and extra boolean `flags`.

    Args: flags: option name -> help text, e.g. {"--resume-from-best": "..."}; all are switches. words: the setting, a list, that takes
        the arguments that are no key=value.
    Returns: (config, namespace); `namespace.dry_run` asks the script to check everything and stop.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="settings (override as key=value):\n" + "\n".join(describe(cls)))
    parser.add_argument("--config", default=default_config, help=f"YAML file (default: {default_config})")
    parser.add_argument("--dry-run", action="store_true", help="check and print everything, then stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    for name, text in (flags or {}).items():
        parser.add_argument(name, action="store_true", help=text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.schedule.lr=3e-4")
    args = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    if words and (found := [word for word in args.overrides if "=" not in word]):
        args.overrides = [f"{words}={yaml.safe_dump(found, default_flow_style=True)}", *(text for text in args.overrides if "=" in text)]
    return load_config(cls, args.config, args.overrides), args


def describe(cls: type[Config], prefix: str = "") -> list[str]:
    """One line per leaf setting, `key=default  meaning`, in definition order; the text of `--help`."""
    lines = []
    for name, field in cls.model_fields.items():
        nested = _nested_configs(field.annotation)
        if len(nested) == 1 and nested[0] is field.annotation:
            lines += describe(nested[0], f"{prefix}{name}.")
        else:
            default = "(required)" if field.is_required() else field.get_default(call_default_factory=True)
            lines.append(f"  {prefix}{name}={default}  {' '.join((field.description or '').split())}")
    return lines


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level, found a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, e.g. train.schedule.lr=3e-4")
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a single value, it has no settings of its own")
        values = child
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML ({error}); quote it, e.g. {key}='\"text\"'") from None
    if isinstance(value, str) and value == text.strip():  # YAML 1.1 reads 3e-4 as text; users mean the number, unless they quote it
        with contextlib.suppress(ValueError):
            value = float(value)
    values[leaf] = value


def _nested_configs(annotation: Any) -> list[type[Config]]:
    """Every Config class inside an annotation: itself, or the members of a union, a list or a dictionary."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for part in get_args(annotation) for found in _nested_configs(part)]


def _explain(cls: type[Config], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    owners: list[type[Config]] = [cls]
    steps = []  # the location without the names of union members, which pydantic puts between the keys
    for part in location[:-1]:
        inner = [found for owner in owners if part in owner.model_fields for found in _nested_configs(owner.model_fields[part].annotation)]
        is_key = part.isdigit() or any(part in owner.model_fields for owner in owners)
        if not is_key:
            tagged = [owner for owner in owners if _discriminates(owner, part)]
            owners = tagged or owners
            steps += [] if tagged else [part]
            continue
        owners = inner or owners
        steps.append(part)
    key = ".".join([*steps, *location[-1:]])
    if problem["type"] != "extra_forbidden":
        found = problem.get("input")
        shown = f" (found {found!r})" if not isinstance(found, dict) else ""
        return f"{key or cls.__name__}: {problem['msg'].removeprefix('Value error, ')}{shown}"
    known = [name for owner in owners for name in owner.model_fields]
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
    return f"unknown key {key}" + (f"; did you mean {'.'.join([*steps, near[0]])}?" if near else "")


def _discriminates(owner: type[Config], tag: str) -> bool:
    """Whether `tag` is the literal value by which a union chooses `owner`."""
    return any(tag in get_args(field.annotation) for field in owner.model_fields.values() if get_origin(field.annotation) is Literal)

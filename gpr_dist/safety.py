"""What keeps secrets in and strangers' paths out: text without credentials, and file names that stay in their folder.

Every config that is written down, every message and every line of a log passes `redact`; every file name that was read from a file
passes `inside` before it is opened. The program itself goes on with the real values.
"""

import os
import re
import sys
import traceback
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

MASK = "***"
_NAME = (r"(?:\w*[_.-])?(?:password|passwd|secret|api_?key|access_?key(?:_?id)?|secret_?key|account_?key|private_?key|credentials?"
         r"|(?:auth|access|bearer|session|security|api|hub|hf|refresh)_?token|signature)")
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_QUERY_NAME = re.compile(rf"{_NAME}|token|sig|key|X-Amz-.*", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"(?:.*_)?(?:KEY|SECRET|TOKEN|PASSWORD|PASSWD|SALT|KEY_ID)", re.IGNORECASE)
_LEAST_SECRET_CHARACTERS = 8  # shorter values of such variables are words that stand everywhere
_RULES = [  # what stands before the @ of a URI, also with a slash in it, or as a Path shows a URI; headers; known forms
    (re.compile(r"(?<=\w\w:/)(/?)(?:[^\s/@'\"]*|(?![^\s/:@]*:\d+/)[^\s/:@'\"]+:[^\s@'\"]+)@"), r"\1"),
    (re.compile(rf"\b({_NAME})(['\"]?\s*[=:]\s*)(?!['\"]?(?:None|null)\b)(?:'[^']*'|\"[^\"]*\"|[^\s'\",;&)}}]+)", re.IGNORECASE),
     rf"\1\2{MASK}"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}"), rf"\1 {MASK}"),
    (re.compile(r"\b(?:(?:hf|gh[pousr])_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|github_pat_\w{16,}|glpat-[\w-]{16,})"), MASK),
]
_QUERY = re.compile(r"(?<=[\w/.*-])\?([^\s'\"#?]*=[^\s'\"#?]*)")


def redact(text: str) -> str:
    """The text without credentials: in URIs they are left out, so that the rest can be opened where the environment has them; elsewhere,
    and where the value of an environment variable like WANDB_API_KEY shows, there is `***`."""
    for secret in _environment_secrets():
        if secret in text:
            text = text.replace(secret, MASK)
    text = _QUERY.sub(_without_secrets, text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def redacted(values: Any, name: str = "") -> Any:
    """Plain values (of a config, say) with every string redacted, and the values of keys like `api_key` masked."""
    if isinstance(values, dict):
        return {key: redacted(value, str(key)) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(redacted(value, name) for value in values)
    if values not in (None, "", False, True) and _SECRET_NAME.fullmatch(name):
        return MASK
    return redact(values) if isinstance(values, str) else values


def redact_tracebacks() -> None:
    """From now on an error that ends the process shows no credentials either."""
    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)

    sys.excepthook = show


def check_name(name: str, where: object, error: type[Exception]) -> None:
    """Refuse a relative path that leads upwards or is absolute, on any system. Args: where: the file that names it, for the message."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or any(sign in name for sign in "\\:\0"):
        raise error(f"{where} names {name!r}, which is not a path inside its folder; do not use it")


def inside(folder: str | Path, name: str, where: object, error: type[Exception]) -> Path:
    """`folder / name` for a name that was read from a file. Raises: `error` when it leads out of the folder, by itself or by a link."""
    check_name(name, where, error)
    path = Path(folder) / name
    if ("/" in name or path.is_symlink()) and not path.resolve().is_relative_to(Path(folder).resolve()):
        raise error(f"{where} names {name!r}, a link that leads out of {folder}; do not use it")
    return path


def open_tensors(path: Path, error: type[Exception], framework: str = "pt", device: str = "cpu") -> Any:
    """A safetensors file, opened. Raises: `error` for anything else, a pickle among them, without looking further into it."""
    try:
        return safe_open(path, framework, device)
    except (OSError, SafetensorError) as problem:
        raise error(f"{path} is missing or no safetensors file ({problem}); make it again, do not use what is there") from None


def load_tensors(path: Path, error: type[Exception], framework: str = "pt", device: str = "cpu") -> dict[str, Any]:
    """All of a safetensors file. Raises: as `open_tensors`."""
    with open_tensors(path, error, framework, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _environment_secrets() -> list[str]:
    return sorted((value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name) and len(value) >= _LEAST_SECRET_CHARACTERS
                   and not os.path.exists(value)), key=len, reverse=True)


def _without_secrets(query: re.Match[str]) -> str:
    kept = [part for part in query[1].split("&") if not _QUERY_NAME.fullmatch(part.partition("=")[0])]
    return f"?{'&'.join(kept)}" if kept else ""

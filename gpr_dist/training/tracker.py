"""Where numbers go: always local JSONL files, W&B as available (the only file that imports it), a progress bar on rank 0.

The JSONL is the truth; W&B is a sink whose failure never stops a run. metrics.jsonl has every step once: a resume takes back the lines
after its checkpoint. events.jsonl only grows: every start, end, checkpoint and alert, with the time.
"""

import contextlib
import json
import math
import netrc
import os
import sys
import time
import uuid
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.safety import redact, redacted
from gpr_dist.schema import write_atomic
from gpr_dist.training.panels import panel_of

EVENTS = "events.jsonl"
ALERT_WAIT_S = 600


class TrackerConfig(Config):
    """Logging."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto = online with an API key, else offline; offline runs are uploaded later by `wandb sync`"""
    project: str = "gpr-dist"
    """W&B project"""
    progress: bool = True
    """progress bar on rank 0"""
    finish_seconds: float = Field(60.0, gt=0)
    """longest wait for W&B's last uploads at the end; what is missing then is on disk for `wandb sync`"""


class Tracker:
    """Rank 0 writes; on other ranks every method does nothing."""

    def __init__(self, config: TrackerConfig, run_folder: Path, resolved_config: dict[str, Any], rank: int, num_steps: int,
                 start_step: int) -> None:
        self.path = run_folder / "metrics.jsonl"
        self._file = self._events = self._wandb = self._bar = None
        if rank != 0:
            return
        run_folder.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(self.path, start_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  lives as long as the run
        self._events = _open_to_append(run_folder / EVENTS)
        self._wandb = _start_wandb(config, run_folder, resolved_config)
        self._bar = tqdm(total=num_steps, initial=start_step, desc="train", unit="step", mininterval=0.5, disable=not config.progress)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of a step; keys may be grouped by a slash, values are numbers or short lists."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **{k: _finite_or_name(v) for k, v in metrics.items()}}) + "\n")
        self._file.flush()
        grouped = {"/".join(panel_of(k)): v for k, v in metrics.items() if isinstance(v, int | float)}
        self._to_wandb(lambda run: run.log(grouped, step=step))

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Record what happened to the run: a start, an end, an alert. Facts are JSON values. On a full disk only a line says so."""
        if self._events is None:
            return
        line = {"time": round(time.time(), 3), "step": step, "event": event, **{k: redacted(_finite_or_name(v)) for k, v in facts.items()}}
        try:
            self._events.write(json.dumps(line).encode() + b"\n")
        except OSError as error:  # often the last words of a run that ends for that very reason
            self.say(f"{EVENTS} could not be written ({error}): {line}")

    def alert(self, step: int, kind: str, text: str) -> None:
        """Something a person must look at: a WARNING line, an event, and W&B's alert, of each kind one in ten minutes."""
        text = redact(text)
        self.event(step, "alert", kind=kind, text=text)
        self.say(f"WARNING: {text}")
        self._to_wandb(lambda run: run.alert(title=kind.replace("_", " "), text=text, level="WARN", wait_duration=ALERT_WAIT_S))

    def advance(self, step: int, **shown: str) -> None:
        """Move the progress bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """A line for the person watching, above the progress bar, without credentials."""
        if self._bar is not None:
            self._bar.write(redact(message), file=sys.stderr)

    def close(self, exit_code: int = 0) -> None:
        """Finish the bar, the file and the W&B run."""
        if self._file is not None:
            self._bar.close()
            self._file.close()
            self._events.close()
            self._to_wandb(lambda run: run.finish(exit_code=exit_code))

    def _to_wandb(self, action: Any) -> None:
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self.say(f"W&B failed and is switched off for the rest of the run ({error}); metrics continue in {self.path}")
            self._wandb = None


def _finite_or_name(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as its name, so that every reader can parse the line."""
    if isinstance(value, list | tuple):
        return [_finite_or_name(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, in order; a last line cut off by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def read_events(run_folder: Path) -> list[dict[str, Any]]:
    """Lines of events.jsonl, in order, with those of runs that ended in the middle of one left out; none without the file."""
    path, lines = run_folder / EVENTS, []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _open_to_append(path: Path) -> IO[bytes]:
    """Unbuffered. After a crash in the middle of a line the next one begins on a line of its own."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115  lives as long as the run
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _drop_lines_after(path: Path, start_step: int) -> None:
    """Steps after the checkpoint will be run, and logged, again."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= start_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _start_wandb(config: TrackerConfig, run_folder: Path, resolved_config: dict[str, Any]) -> Any:
    mode = config.wandb
    if mode == "auto":  # WANDB_MODE is the user's own word for it
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")
    if mode == "disabled":
        return None
    try:
        import wandb  # here: half a second that jobs and ranks without it need not wait

        sys.argv[1:] = map(redact, sys.argv[1:])  # W&B uploads the command line
        settings = wandb.Settings(silent=True, init_timeout=20, finish_timeout=config.finish_seconds, finish_timeout_raises=True)
        return wandb.init(project=config.project, name=run_folder.name, id=_run_id(run_folder), resume="allow", dir=str(run_folder),
                          config=resolved_config, mode=mode, settings=settings)
    except Exception as error:
        problem = redact(str(error))
        print(f"W&B could not be started ({problem}); metrics go to {run_folder}/metrics.jsonl only", file=sys.stderr, flush=True)
        return None


def _has_api_key() -> bool:
    """A key in the environment or, where `wandb login` puts it, in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_folder: Path) -> str:
    """One id per run folder, so that a resumed run goes on in W&B and two runs of one name stay apart."""
    path = run_folder / "wandb_id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:12].encode())
    return path.read_text().strip()

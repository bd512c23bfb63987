"""Whether a cluster can run a config, before it is booked: facts of every host (host_facts.py), judged against each other and the config.

Each check is a function from facts to findings; only `examine` and `wandb_answers` touch anything.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.data.sampler import build_sampling
from gpr_dist.errors import ConfigError, DataError, TokenizerError
from gpr_dist.host_facts import ROOT
from gpr_dist.job import PretrainConfig, resolve, split_shards, tokenizer_folder
from gpr_dist.model.flops import count_parameters
from gpr_dist.model.memory import checkpoint_bytes
from gpr_dist.safety import redact

MAX_SKEW_S = 5.0
MIN_SHM_BYTES = 1 << 30
SECRET = re.compile(r"key|token|secret|password", re.I)
CARRIED_BY_DEEPSPEED = ("PYTHON", "NCCL", "MLFLOW", "UCX", "MV2")
WORTH_CARRYING = re.compile(r"(OMP|GLOO|CUDA|TORCH|WANDB|AWS)_\w+|LD_LIBRARY_PATH|HTTPS?_PROXY", re.I)


class ClusterConfig(Config):
    """The hosts a run is meant for, and how to get there."""

    hostfile: Path | None = None
    """DeepSpeed's: a line `name slots=8` per host; none = this host alone"""
    remote: str = "ssh -o BatchMode=yes -o ConnectTimeout=5 {host}"
    """runs a command on a host, with standard input. SLURM: srun --overlap -N1 -n1 -w {host}; Kubernetes: kubectl exec -i {host} --"""
    port: int = Field(29500, ge=1, le=65535)
    """of the rendezvous on the first host: --master_port of deepspeed, --rdzv-endpoint of torchrun"""
    wait_seconds: float = Field(20.0, gt=0)
    """longest wait of the hosts for each other"""


class DoctorConfig(PretrainConfig):
    """The run that is meant, and the cluster."""

    cluster: ClusterConfig = ClusterConfig()
    """where it will run"""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    status: Literal["ok", "warn", "fail"]
    host: str  # "" = the whole cluster
    what: str
    found: str
    advice: str = ""


Facts = dict[str, dict[str, Any]]  # by host; {"error": ...} of one that could not be asked


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in order. Raises: ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the hostfile {path}: {error.strerror}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.split("#")[0].strip()):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not match or match[1] in slots:
            raise ConfigError(f"{path}, line {number}: {text!r} is not `name slots=8`, each name once")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"the hostfile {path} names no host")
    return slots


def check(config: DoctorConfig) -> list[Finding]:
    """Ask every host and judge; findings in the order in which one would repair them."""
    with contextlib.suppress(DataError, TokenizerError):  # data that is not built yet leaves the model's sizes as configured
        config, _, _ = resolve(config)
    slots = read_hostfile(config.cluster.hostfile) if config.cluster.hostfile else {"localhost": 0}
    facts, folder_problem = examine(config, list(slots))
    findings = [*check_hosts(facts), *check_versions(facts), *check_devices(facts, slots), *check_network(facts, config.cluster.port)]
    findings += [folder_problem] if folder_problem else [*check_folder(facts, config), *check_space(config)]
    findings += [*check_clocks(facts), *check_limits(facts, sum(slots.values()))]
    if config.cluster.hostfile:
        findings += [*check_sizes(config, sum(slots.values())), *check_launcher(os.environ, [Path.home(), Path.cwd()])]
    return [*findings, *check_wandb(config, os.environ)]


def examine(config: DoctorConfig, names: list[str]) -> tuple[Facts, Finding | None]:
    """Facts of every host, all asked at the same time; and what is wrong with the run folder as seen from here."""
    run_folder = config.run.folder.resolve()
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        meeting = tempfile.mkdtemp(prefix=".doctor-", dir=run_folder)
    except OSError as error:
        return {}, Finding("fail", "", "run folder", f"{run_folder}: {error.strerror}", "give the user write access, or set run.folder")
    inputs = [str(path.resolve()) for path in (config.data.folder, tokenizer_folder(config.data)) if path.exists()]
    local = config.cluster.hostfile is None
    try:
        with concurrent.futures.ThreadPoolExecutor(max_workers=len(names)) as pool:
            asked = [pool.submit(_ask, [] if local else shlex.split(config.cluster.remote.format(host=name)),
                                 [number, names, meeting, inputs, config.cluster.port, config.cluster.wait_seconds],
                                 60 + 3 * config.cluster.wait_seconds) for number, name in enumerate(names)]
            return {name: answer.result() for name, answer in zip(names, asked, strict=True)}, None
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _ask(remote: list[str], arguments: list[Any], timeout: float) -> dict[str, Any]:
    # By standard input: every remote shell would want its own quoting.
    program = (f"import json, os, sys\nos.chdir({str(Path.cwd())!r})\nsys.path.insert(0, {str(ROOT)!r})\n"
               f"from gpr_dist.host_facts import meet\nprint('FACTS' + json.dumps(meet(*json.loads({json.dumps(arguments)!r}))))\n")
    started = time.time()
    try:
        done = subprocess.run([*remote, sys.executable, "-"], input=program, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{shlex.join(remote)}: {getattr(error, 'strerror', None) or f'no answer within {timeout:g} s'}"}
    answers = [line for line in done.stdout.splitlines() if line.startswith("FACTS")]
    if not answers:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": f"{shlex.join([*remote, sys.executable])}: {last}"}
    return json.loads(answers[0].removeprefix("FACTS")) | {"asked": (started, time.time())}


def check_hosts(facts: Facts) -> Iterator[Finding]:
    """Whether every host answered."""
    for host, known in facts.items():
        if "error" in known:
            yield Finding("fail", host, "login", known["error"],
                          "the same user needs ssh without a password (ssh-copy-id), the host key in known_hosts, python at the same path")
        else:
            yield Finding("ok", host, "login", "answers")


def check_versions(facts: Facts) -> Iterator[Finding]:
    """Whether all hosts have the same software, and have it at all."""
    answered = _answered(facts)
    for package in next(iter(answered.values()), {}).get("versions", {}):
        found = {host: known["versions"].get(package, "missing") for host, known in answered.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        if usual == "missing" or len(set(found.values())) > 1:
            for host, version in found.items():
                if version in ("missing",) or version != usual:
                    yield Finding("fail", host, package, f"{version}; most hosts: {usual}", "install the same environment on every host")
        else:
            yield Finding("ok", "", package, usual)


def check_devices(facts: Facts, slots: dict[str, int]) -> Iterator[Finding]:
    """Whether every host has a device for each of its ranks."""
    for host, known in _answered(facts).items():
        devices, wanted = known["devices"], slots.get(host, 0)
        if devices:
            names = ", ".join(f"{count} x {name}" for name, count in Counter(devices).items())
            short = len(devices) < wanted
            yield Finding("fail" if short else "ok", host, "devices", names, f"slots={wanted} in the hostfile is too many" if short else "")
        elif wanted > known["cores"]:
            yield Finding("warn", host, "devices", f"no GPU, {known['cores']} CPU cores for {wanted} ranks", "lower its slots")
        else:
            yield Finding("ok", host, "devices", f"no GPU, {known['cores']} CPU cores")
    kinds = {name for known in _answered(facts).values() for name in known["devices"]}
    if len(kinds) > 1:
        yield Finding("warn", "", "devices", f"a mixture: {', '.join(sorted(kinds))}", "every step waits for the slowest device")


def check_network(facts: Facts, port: int) -> Iterator[Finding]:
    """Whether ranks can meet at the first host, and reach each other at ports the system chooses."""
    for host, known in _answered(facts).items():
        problems = known["problems"]
        if "port" in problems:
            yield Finding("fail", host, "port", problems["port"], "end what listens there (ss -ltnp), or take another: cluster.port here, "
                          "--master_port of deepspeed, --rdzv-endpoint of torchrun")
        for kind, advice in (("rendezvous", f"open port {port} of the first host to all others"),
                             ("any", "open all ports between the hosts: gloo and NCCL listen where the system lets them")):
            if problem := problems.get(f"reach_{kind}"):
                yield Finding("fail", host, "reach", problem, advice)
        if problems.keys() & {"write", "shared"}:
            yield Finding("warn", host, "network", "not tried with every host", "hosts meet in the run folder: repair that first")
        elif not problems.keys() & {"port", "reach_rendezvous", "reach_any"}:
            yield Finding("ok", host, "network", f"ports free and reached; interface {known['interface'] or 'of the host name'}")
        if len(facts) > 1 and known["interface"] is None:
            yield Finding("warn", host, "interface", "several, and no route that decides", "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")


def check_folder(facts: Facts, config: PretrainConfig) -> Iterator[Finding]:
    """Whether the run folder is one folder, and the data is there."""
    for host, known in _answered(facts).items():
        for kind, advice in (("write", "mount it read-write, with the same user id on every host"),
                             ("shared", "run.folder must be one folder, on storage that all hosts mount at the same path")):
            if problem := known["problems"].get(kind):
                yield Finding("fail", host, "run folder", problem, advice)
        if not known["problems"].keys() & {"write", "shared"}:
            yield Finding("ok", host, "run folder", f"{config.run.folder.resolve()} is shared, rename and fsync work")
        for path in known["missing_inputs"]:
            yield Finding("fail", host, "data", f"does not see {path}", "mount the data at the same path on every host")
    missing = [path for path in (tokenizer_folder(config.data), Path(split_shards(config.data)["train"])) if "://" not in str(path)
               and not path.exists()]
    for path in missing:
        yield Finding("warn", "", "data", f"{path} does not exist", "build it beforehand: all ranks would wait for the first one to do it")


def check_space(config: PretrainConfig) -> Iterator[Finding]:
    """Whether what the retention rules keep fits on the disk."""
    saving = config.train.checkpoint
    each = checkpoint_bytes(sum(count_parameters(config.model).values()), 1)
    milestones = config.train.schedule.num_steps // saving.keep_every_steps if saving.keep_every_steps else 0
    count = saving.keep_last + 1 + saving.keep_best + milestones  # one more while it is written
    free = shutil.disk_usage(config.run.folder.resolve()).free
    found = f"{_gib(free)} free; up to {count} checkpoints of {_gib(each)}"
    yield Finding("ok" if free > each * count else "fail", "", "space", found,
                  "" if free > each * count else "make room, or keep fewer: train.checkpoint.keep_last, keep_every_steps")


def check_clocks(facts: Facts) -> Iterator[Finding]:
    """Whether the hosts agree on the time; what the question itself may have taken is in their favour."""
    worst = 0.0
    for host, known in _answered(facts).items():
        asked, answered = known["asked"]
        skew = max(asked - known["time"], known["time"] - answered, 0.0)
        worst = max(worst, skew)
        if skew > MAX_SKEW_S:
            yield Finding("warn", host, "clock", f"off by {skew:.0f} s or more", "run chrony or ntpd: logs and W&B sort by time")
    if _answered(facts) and worst <= MAX_SKEW_S:
        yield Finding("ok", "", "clock", f"within {MAX_SKEW_S:g} s")


def check_limits(facts: Facts, world_size: int) -> Iterator[Finding]:
    """Open files for a connection per rank, and shared memory."""
    wanted = 1024 + 4 * world_size
    for host, known in _answered(facts).items():
        enough = known["open_files"] < 0 or known["open_files"] >= wanted  # -1: no limit
        yield Finding("ok" if enough else "warn", host, "open files", f"at most {known['open_files']}",
                      "" if enough else f"ulimit -n {max(65536, wanted)} (LimitNOFILE of sshd or slurmd, /etc/security/limits.conf)")
        roomy = known["shm_bytes"] >= MIN_SHM_BYTES
        yield Finding("ok" if roomy else "warn", host, "/dev/shm", f"{_gib(known['shm_bytes'])} free",
                      "" if roomy else "NCCL between ranks of a host wants more than 1 GiB: --shm-size, or an emptyDir of medium Memory")


def check_sizes(config: PretrainConfig, world_size: int) -> Iterator[Finding]:
    """Whether this many ranks can share a step."""
    loader = config.data.loader
    try:
        build_sampling(loader.seed, loader.global_batch_size, world_size, loader.micro_batch_tokens, loader.num_streams,
                       loader.shuffle_rows, loader.quadratic_at, loader.balance)
    except ConfigError as error:
        yield Finding("fail", "", "batch", str(error), "change data.loader, or the slots")
    else:
        yield Finding("ok", "", "batch", f"{loader.global_batch_size} journeys a step on {world_size} ranks")


def check_launcher(environment: Any, folders: list[Path]) -> Iterator[Finding]:
    """Whether `deepspeed --hostfile` would find pdsh, and carry this shell's settings to the ranks. Args: folders: of .deepspeed_env."""
    if not shutil.which("pdsh"):
        yield Finding("warn", "", "pdsh", "not installed here", "apt-get install pdsh; or torchrun, or deepspeed --no_ssh, on every host")
    files = [folder / ".deepspeed_env" for folder in folders if (folder / ".deepspeed_env").exists()]
    carried = {line.split("=")[0].strip() for file in files for line in file.read_text().splitlines()}
    for name in sorted(carried):
        if SECRET.search(name):
            yield Finding("fail", "", ".deepspeed_env", f"holds {name}", "deepspeed prints it: keep W&B's key in ~/.netrc (wandb login)")
    left = sorted(name for name in environment if WORTH_CARRYING.fullmatch(name) and name not in carried
                  and not SECRET.search(name) and not name.startswith(CARRIED_BY_DEEPSPEED))
    if left:
        yield Finding("warn", "", "environment", f"set here, not carried by deepspeed: {', '.join(left)}",
                      "lines NAME=value in .deepspeed_env, in the folder you start from; torchrun takes each host's own environment")


def check_wandb(config: PretrainConfig, environment: Any) -> Iterator[Finding]:
    """Whether W&B answers, if it is meant to."""
    mode = config.tracker.wandb if config.tracker.wandb != "auto" else environment.get("WANDB_MODE", "auto")
    if mode in ("offline", "disabled"):
        yield Finding("ok", "", "W&B", mode)
        return
    url = environment.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if problem := wandb_answers(url):
        yield Finding("warn", "", "W&B", f"{redact(url)}: {problem}", "the run does without it: WANDB_MODE=offline, `wandb sync` later")
    else:
        yield Finding("ok", "", "W&B", f"{redact(url)} answers")


def wandb_answers(url: str, timeout: float = 5.0) -> str | None:
    """What goes wrong on the way to `url`, or None; any answer of a server counts."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def table(findings: list[Finding]) -> str:
    """Findings as text: the bad ones one by one with what to do, good ones that all hosts share on one line."""
    hosts: dict[tuple[str, ...], list[str]] = {}
    for finding in findings:
        hosts.setdefault((finding.status, finding.what, finding.found, finding.advice), []).append(finding.host)
    lines = []
    for (status, what, found, advice), where in hosts.items():
        shown = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
        lines.append(f"{status:<5} {what:<14} {shown + ': ' if shown else ''}{found}" + (f"\n{'':<20} -> {advice}" if advice else ""))
    counts = Counter(finding.status for finding in findings)
    return "\n".join([*lines, f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures"])


def _answered(facts: Facts) -> Facts:
    return {host: known for host, known in facts.items() if "error" not in known}


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"

"""Templates for SLURM and Kubernetes: what they call exists, what they set is understood, and a signal ends as the page says."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from ranks import ROOT

from gpr_dist.config import describe, load_config
from gpr_dist.doctor import DoctorConfig
from gpr_dist.job import PretrainConfig

SBATCH = ROOT / "launch" / "slurm" / "pretrain.sbatch"
K8S = ROOT / "launch" / "k8s"
IMAGE_ROOT = "/opt/gpr-dist"
RECORD = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >> "$RECORD"\n'
FAKES = {
    "srun": 'while [ "$1" != torchrun ]; do shift; done\nexec "$@"\n',
    "scontrol": '[ "$2" = hostnames ] && printf "node1\\nnode2\\n"\n'
                '[ "$2" = job ] && printf " StartTime=2026-01-02T10:00:00 EndTime=x\\n PreemptTime=${PREEMPTED:-None} Suspend=None\\n"\n'
                'exit 0\n',
    "scancel": 'kill -USR1 "$(cat "$RECORD.pid")"\n',
    "torchrun": 'echo $$ > "$RECORD.pid"\ntrap "sleep 0.3; exit 1" USR1\n[ -n "${END:-}" ] && exit "$END"\n'
                'for _ in $(seq 200); do sleep 0.05; done\n'}


def containers(name: str) -> dict[str, tuple[dict, dict]]:
    """By replica type: (the replica's pod, its only container)."""
    manifest = yaml.safe_load((K8S / name).read_text())
    spec = manifest["spec"]
    replicas = spec.get("pytorchReplicaSpecs") or spec["mpiReplicaSpecs"]
    return {kind: (replica, replica["template"]["spec"]["containers"][0]) for kind, replica in replicas.items()}


def command_of(container: dict) -> list[str]:
    """Words of what a container runs; those of a shell's last command."""
    words = [*container["command"], *container.get("args", [])]
    return shlex.split(words[-1].split("exec ")[-1].replace("\\\n", " ")) if words[0] == "bash" else words


def parse_torchrun(words: list[str]) -> list[str]:
    """The script and its arguments, after torchrun's own parser has understood the rest."""
    from torch.distributed.run import get_args_parser

    assert words[0] == "torchrun"
    args = get_args_parser().parse_args(words[1:])
    return [args.training_script, *args.training_script_args]


def check_script(words: list[str]) -> PretrainConfig:
    """That a command line calls a script of ours with settings it understands."""
    script, *arguments = [word.replace(IMAGE_ROOT, str(ROOT)) for word in words]
    assert Path(script).parent == ROOT / "launch" and Path(script).exists()
    config = [arguments.pop(number).removeprefix("--config=") for number, word in enumerate(arguments) if word.startswith("--config=")]
    if "--config" in arguments:
        at = arguments.index("--config")
        config, arguments = [arguments[at + 1]], arguments[:at] + arguments[at + 2 :]
    return load_config(PretrainConfig, config[0], arguments)


@pytest.fixture
def submit(tmp_path):
    """Start the batch script as SLURM would, with stand-ins for its commands. Returns: process, what they were called with."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(RECORD + body)
        path.chmod(0o755)
    record, started = tmp_path / "calls", []

    def start(**environment: str):
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RECORD": str(record), "SLURM_SUBMIT_DIR": str(tmp_path),
               "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", **environment}
        process = subprocess.Popen(["bash", str(SBATCH), "run.name=a b", "engine.precision=bf16"], env=env, start_new_session=True)
        started.append(process)
        return process, lambda: record.read_text().splitlines() if record.exists() else []

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_training(calls, folder: Path) -> None:
    deadline = time.monotonic() + 20
    while not (folder / "calls.pid").exists() or not (folder / "calls.pid").read_text():
        assert time.monotonic() < deadline, calls()
        time.sleep(0.02)
    time.sleep(0.2)  # its trap is set


@pytest.mark.parametrize(("number", "requeued", "code"), [(signal.SIGUSR1, True, 0), (signal.SIGTERM, False, 1)])
def test_slurm_saves_and_requeues(submit, tmp_path, number, requeued, code):
    """Before its time is up the job tells its ranks, waits for them, and requeues itself; cancelled, it only tells them."""
    process, calls = submit()
    wait_until_training(calls, tmp_path)
    os.kill(process.pid, number)
    assert process.wait(20) == code
    torchrun, = [shlex.split(line) for line in calls() if line.startswith("torchrun")]
    assert "node1:20007" in torchrun and torchrun[torchrun.index("--nnodes") + 1] == "2"
    assert [line for line in calls() if line.startswith("scancel")] == ["scancel --signal=USR1 7"]
    assert ("scontrol requeue 7" in calls()) == requeued


@pytest.mark.parametrize(("ended", "preempted", "requeued"), [
    (0, "2026-01-02T11:00:00", False), (3, "None", False), (3, "2026-01-02T09:00:00", False), (3, "2026-01-02T11:00:00", True)])
def test_slurm_job_ends_as_its_training_does_unless_preempted(submit, ended, preempted, requeued):
    """Preempted in this life, not in an earlier one: SLURM tells the ranks, and leaves a job that ends by itself out of the queue."""
    process, calls = submit(END=str(ended), PREEMPTED=preempted)
    assert process.wait(20) == (0 if requeued else ended)
    assert ("scontrol requeue 7" in calls()) == requeued


def test_slurm_calls_what_exists():
    text = SBATCH.read_text()
    command = re.search(r"srun --\S+ (torchrun .*?) &\n", text.replace("\\\n", " "), re.S).group(1)
    filled = re.sub(r'"\$\{[^"]*\}"|"\$\w+"', "2", re.sub(r'"launch/[^"]*"', "launch/pretrain.py", command)).replace('"$@"', "")
    assert parse_torchrun(shlex.split(filled))[0] == "launch/pretrain.py"
    example = re.search(r"^#\s+sbatch launch/slurm/pretrain.sbatch (.*)", text, re.M).group(1)
    load_config(PretrainConfig, None, example.replace("--config my_run.yaml", "").split())
    seconds = int(re.search(r"--signal=B:USR1@(\d+)", text).group(1))
    assert seconds > int(re.search(r"--shutdown-timeout (\d+)", text).group(1)), "SLURM would kill what is still saving"
    if shellcheck := shutil.which("shellcheck"):
        assert subprocess.run([shellcheck, str(SBATCH)], capture_output=True, text=True).stdout == ""


def test_pytorchjob_calls_what_exists():
    pod, container = containers("pytorchjob.yaml")["Worker"]
    command = command_of(container)
    config = check_script(parse_torchrun(command))
    assert container["name"] == "pytorch", "the operator passes its variables to the container of this name only"
    assert pod["restartPolicy"] == "OnFailure" and config.run.stopped_exit_code, "a pod that was stopped would count as done"
    assert pod["template"]["spec"]["terminationGracePeriodSeconds"] > int(command[command.index("--shutdown-timeout") + 1])
    spec = yaml.safe_load((K8S / "pytorchjob.yaml").read_text())["spec"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    ranks = int(spec["nprocPerNode"]) * spec["elasticPolicy"]["maxReplicas"]
    assert spec["elasticPolicy"]["maxReplicas"] == pod["replicas"] and config.data.loader.global_batch_size % ranks == 0


def test_mpijob_calls_what_exists():
    replicas = containers("mpijob.yaml")
    launcher, worker = replicas["Launcher"], replicas["Worker"]
    deepspeed, *words = command_of(launcher[1])
    assert deepspeed == "deepspeed" and words[:2] == ["--hostfile", "/etc/mpi/hostfile"]
    assert check_script(words[2:]).run.stopped_exit_code and launcher[0]["restartPolicy"] == "OnFailure"
    assert worker[1]["command"][0].endswith("sshd")
    assert launcher[1]["workingDir"] in {mount["mountPath"] for mount in worker[1]["volumeMounts"]}, "deepspeed goes there on every host"


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "mpijob.yaml"])
def test_pods_that_train_have_shared_memory_and_the_shared_folder(name):
    for kind, (replica, container) in containers(name).items():
        volumes = {volume["name"]: volume for volume in replica["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert "persistentVolumeClaim" in mounts["/shared"]
        assert kind == "Launcher" or mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert all("value" not in entry for entry in container.get("env", []) if "KEY" in entry["name"]), "a secret in the manifest"


def test_the_page_names_what_exists():
    text = (ROOT / "launch" / "cluster.md").read_text()
    for path in re.findall(r"(?:launch|tests)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    settings = {line.split("=")[0].strip() for line in describe(DoctorConfig)}
    named = set(re.findall(r"\b((?:data|run|train|engine|cluster|tracker)(?:\.[a-z_]+)+)(?==|`|,| )", text))
    assert len(named) > 10 and named <= settings, named - settings
    assert "cluster.hostfile=hosts" in text


def test_image_holds_what_the_manifests_call():
    dockerfile = (K8S / "Dockerfile").read_text()
    assert f"WORKDIR {IMAGE_ROOT}\nCOPY . ." in dockerfile
    assert all(package in dockerfile for package in ("openssh-server", "pdsh"))

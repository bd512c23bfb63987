"""`launch/doctor.py` on hosts made of namespaces: what is healthy passes, what is broken is named."""

import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Host, hosts, write_hostfile
from ranks import ROOT

ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
               "WANDB_MODE": "offline", "PYTHONWARNINGS": "ignore"}


def run_doctor(used: list[Host], folder: Path, *overrides: str) -> tuple[int, str]:
    """From the first host, for all. Returns: exit code, the table."""
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nWANDB_MODE=offline\n")
    hostfile = write_hostfile(folder / "hostfile", used)
    done = used[0].run([sys.executable, str(ROOT / "launch" / "doctor.py"), f"cluster.hostfile={hostfile}", f"run.folder={folder}/runs",
                        f"data.folder={folder}", "data.build=null", *overrides], cwd=folder, env=ENVIRONMENT, check=False, timeout=240)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def failures(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("fail ")]


def test_a_taken_port_and_a_folder_that_is_not_shared(tmp_path):
    (tmp_path / "runs").mkdir()
    with hosts(2, tmp_path / "hosts") as both:
        both[1].run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "runs")])
        listener = "import socket, time; server = socket.create_server(('', 29500)); print('up', flush=True); time.sleep(600)"
        taken = both[0].start([sys.executable, "-c", listener], stdout=subprocess.PIPE, text=True)
        assert taken.stdout.readline() == "up\n"
        code, table = run_doctor(both, tmp_path, "cluster.wait_seconds=5")
    assert code == 1, table
    assert any("port 29500 is taken" in line and "host0" in line for line in failures(table)), table
    assert any(line.startswith("fail  run folder") and "host1" in line for line in failures(table)), table
    assert "host0, host1: answers" in table


@pytest.mark.soak
def test_healthy_hosts_pass_and_a_cut_cable_is_found(tmp_path):
    with hosts(3, tmp_path / "hosts") as three:
        code, table = run_doctor(three, tmp_path, "data.loader.global_batch_size=12")
        assert (code, failures(table)) == (0, []), table
        assert "interface eth0" in table and "12 journeys a step on 3 ranks" in table
        assert not list((tmp_path / "runs").glob(".doctor-*"))
        three[2].cut()
        code, table = run_doctor(three, tmp_path, "data.loader.global_batch_size=12", "cluster.wait_seconds=2")
    assert code == 1 and any(line.startswith("fail  login") and "host2" in line for line in failures(table)), table
    assert not any("host1" in line for line in failures(table) if "login" in line), table

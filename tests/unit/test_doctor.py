"""The doctor's judgement of made-up facts, and hosts that meet in one folder (here: threads)."""

import threading
import time

import pytest
from ranks import free_port

from gpr_dist import doctor, host_facts
from gpr_dist.doctor import ClusterConfig, DoctorConfig, Finding
from gpr_dist.errors import ConfigError


def facts_of(**changes):
    """Of a healthy host, with changes."""
    return {"hostname": "h", "versions": {"python": "3.11.7", "torch": "2.13.0"}, "devices": [], "cores": 8, "interface": "eth0",
            "open_files": 65536, "shm_bytes": 8 << 30, "missing_inputs": [], "problems": {},
            "time": 100.0, "asked": (99.0, 101.0), **changes}


def bad(findings):
    """(status, host, what) of all that is not in order; each must say what to do."""
    found = [finding for finding in findings if finding.status != "ok"]
    assert all(finding.advice and finding.found for finding in found)
    return [(finding.status, finding.host, finding.what) for finding in found]


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nworker-1 slots=8\n\nworker-2.local   slots=4  # small\n")
    assert doctor.read_hostfile(path) == {"worker-1": 8, "worker-2.local": 4}
    for text, says in [("worker-1\n", "line 1"), ("a slots=8\na slots=8\n", "line 2"), ("a slots=x\n", "line 1"), ("#\n", "no host")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            doctor.read_hostfile(path)
    with pytest.raises(ConfigError, match="cannot read"):
        doctor.read_hostfile(tmp_path / "none")


def test_healthy_hosts_pass(tmp_path):
    facts = {"a": facts_of(), "b": facts_of()}
    config = DoctorConfig(run={"folder": tmp_path}, data={"folder": tmp_path})
    assert bad(doctor.check_hosts(facts)) == bad(doctor.check_versions(facts)) == bad(doctor.check_network(facts, 1)) == []
    assert bad(doctor.check_devices(facts, {"a": 8, "b": 8})) == bad(doctor.check_clocks(facts)) == []
    assert bad(doctor.check_limits(facts, 16)) == []
    assert bad(doctor.check_space(config)) == bad(doctor.check_sizes(config, 2)) == []


def test_each_illness_is_found():
    down = {"error": "ssh: Connection refused"}
    assert bad(doctor.check_hosts({"a": facts_of(), "b": down})) == [("fail", "b", "login")]
    other = facts_of(versions={"python": "3.11.7", "torch": "2.12.0"})
    assert bad(doctor.check_versions({"a": facts_of(), "b": other, "c": facts_of(), "d": down})) == [("fail", "b", "torch")]
    absent = facts_of(versions={"python": "3.11.7", "torch": "missing"})
    assert bad(doctor.check_versions({"a": absent, "b": absent})) == [("fail", "a", "torch"), ("fail", "b", "torch")]
    gpus = facts_of(devices=["H200"] * 4)
    assert bad(doctor.check_devices({"a": gpus, "b": facts_of(devices=["A100"] * 8)}, {"a": 8, "b": 8})) == [
        ("fail", "a", "devices"), ("warn", "", "devices")]
    assert bad(doctor.check_devices({"a": facts_of()}, {"a": 16})) == [("warn", "a", "devices")]
    problems = {"port": "taken", "reach_any": "b:1: refused", "reach_rendezvous": "a:1: refused"}
    assert bad(doctor.check_network({"a": facts_of(problems=problems), "b": facts_of(interface=None)}, 29500)) == [
        ("fail", "a", "port"), ("fail", "a", "reach"), ("fail", "a", "reach"), ("warn", "b", "interface")]
    assert bad(doctor.check_network({"a": facts_of(problems={"shared": "nothing from b"})}, 29500)) == [("warn", "a", "network")]
    assert bad(doctor.check_clocks({"a": facts_of(), "b": facts_of(time=110.0), "c": facts_of(time=80.0)})) == [
        ("warn", "b", "clock"), ("warn", "c", "clock")]
    assert bad(doctor.check_limits({"a": facts_of(open_files=1024, shm_bytes=64 << 20), "b": facts_of(open_files=-1)}, 8)) == [
        ("warn", "a", "open files"), ("warn", "a", "/dev/shm")]


def test_folder_data_space_and_batch(tmp_path, monkeypatch):
    config = DoctorConfig(run={"folder": tmp_path}, data={"folder": tmp_path, "loader": {"global_batch_size": 16}})
    facts = {"a": facts_of(), "b": facts_of(problems={"shared": "nothing from a"}, missing_inputs=["/data"])}
    assert bad(doctor.check_folder(facts, config)) == [("fail", "b", "run folder"), ("fail", "b", "data"), ("warn", "", "data"),
                                                       ("warn", "", "data")]
    assert bad(doctor.check_sizes(config, 3)) == [("fail", "", "batch")]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert bad(doctor.check_space(config)) == [("fail", "", "space")]


def test_space_counts_what_retention_keeps(tmp_path, monkeypatch):
    parameters = sum(doctor.count_parameters(DoctorConfig().model).values())
    keep = {"keep_last": 2, "keep_best": True, "keep_every_steps": 100}
    config = DoctorConfig(run={"folder": tmp_path}, train={"checkpoint": keep, "schedule": {"num_steps": 500}})
    needed = 12 * parameters * (2 + 1 + 1 + 5)
    for free, status in [(needed, "fail"), (needed + 1, "ok")]:
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        assert [finding.status for finding in doctor.check_space(config)] == [status]


def test_what_deepspeed_would_not_carry(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/pdsh")
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    environment = {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO", "PATH": "/bin", "WANDB_API_KEY": "x"}
    assert bad(doctor.check_launcher(environment, [tmp_path])) == []
    warning, = doctor.check_launcher(environment | {"GLOO_SOCKET_IFNAME": "eth1"}, [tmp_path])
    assert warning.status == "warn" and warning.found.endswith("GLOO_SOCKET_IFNAME")
    (tmp_path / ".deepspeed_env").write_text("WANDB_API_KEY=verysecret\nOMP_NUM_THREADS=1\n")
    secret, = doctor.check_launcher(environment, [tmp_path])
    assert secret.status == "fail" and "verysecret" not in secret.found + secret.advice
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert bad(doctor.check_launcher({}, [tmp_path]))[0] == ("warn", "", "pdsh")


def test_wandb_is_asked_only_if_it_is_meant(monkeypatch):
    config, refused = DoctorConfig(), {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    assert bad(doctor.check_wandb(config, refused)) == [("warn", "", "W&B")]
    monkeypatch.setattr(doctor, "wandb_answers", lambda url: pytest.fail("asked"))
    for environment in ({"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}):
        assert bad(doctor.check_wandb(config, environment)) == []


def test_table_names_hosts_and_advice():
    text = doctor.table([Finding("ok", "a", "login", "answers"), Finding("ok", "b", "login", "answers"),
                         Finding("fail", "b", "port", "taken", "free it")])
    assert text.splitlines() == ["ok    login          a, b: answers", "fail  port           b: taken", " " * 21 + "-> free it",
                                 "2 ok, 0 warnings, 1 failures"]


def meet_together(names, folder, numbers, port, seconds=20.0):
    results = {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: host_facts.meet(n, names, str(folder), ["/"], port, seconds)}))
               for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_hosts_meet_and_reach_each_other(tmp_path):
    results = meet_together(["127.0.0.1"] * 3, tmp_path, range(3), free_port())
    assert [results[n]["problems"] for n in range(3)] == [{}] * 3
    assert results[0]["versions"]["this code"] == host_facts.code_fingerprint() and abs(results[0]["time"] - time.time()) < 60


def test_a_missing_host_and_a_taken_port_are_named(tmp_path):
    with host_facts._listen(0) as taken:
        results = meet_together(["127.0.0.1", "127.0.0.2", "gone"], tmp_path, [0, 1], taken.getsockname()[1], seconds=0.5)
    assert "is taken" in results[0]["problems"]["port"]
    assert all("gone" in results[n]["problems"]["shared"] for n in (0, 1))


def test_remote_that_fails_is_a_finding_not_a_crash(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("nowhere slots=1\n")
    config = DoctorConfig(run={"folder": tmp_path / "runs"}, cluster=ClusterConfig(hostfile=hostfile, remote="false {host}"))
    facts, problem = doctor.examine(config, ["nowhere"])
    assert problem is None and bad(doctor.check_hosts(facts)) == [("fail", "nowhere", "login")]
    assert list((tmp_path / "runs").iterdir()) == [], "the meeting place is left behind"

"""Which interface reaches other hosts, on made-up hosts; tests/integration/test_many_hosts.py shows it on real networks."""

import socket
from collections import namedtuple

import pytest

from gpr_dist import network
from gpr_dist.errors import ConfigError

Address = namedtuple("Address", "family address")
State = namedtuple("State", "isup")
LOOPBACK, OWN, OTHER = "127.0.0.1", "10.0.0.1", "172.17.0.1"


def make_host(monkeypatch, interfaces, routes, down=()):
    """Interfaces by name, and by target the address the kernel would send from."""
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: {name: [Address(socket.AF_INET, a)] for name, a in interfaces.items()})
    monkeypatch.setattr(network.psutil, "net_if_stats", lambda: {name: State(name not in down) for name in interfaces})
    monkeypatch.setattr(network, "_source_address", routes.get)


@pytest.mark.parametrize(("interfaces", "routes", "expected"), [
    ({"lo": LOOPBACK, "eth0": OWN, "docker0": OTHER}, {"host0": OWN}, "eth0"),  # another host
    ({"lo": LOOPBACK, "eth0": OWN, "docker0": OTHER}, {"host0": LOOPBACK, network.ANYWHERE: OWN}, "eth0"),  # itself, by its loopback name
    ({"lo": LOOPBACK, "eth0": OWN}, {"host0": LOOPBACK}, "eth0"),  # itself, without a default route
    ({"lo": LOOPBACK, "eth0": OWN, "eth1": OTHER}, {"host0": LOOPBACK}, None),  # nothing decides
    ({"lo": LOOPBACK, "eth0": "fe80::1%eth0"}, {}, None)])
def test_interface(monkeypatch, interfaces, routes, expected):
    make_host(monkeypatch, interfaces, routes)
    assert network.interface_to("host0") == expected


def test_interfaces_that_are_down_do_not_count(monkeypatch):
    make_host(monkeypatch, {"lo": LOOPBACK, "eth0": OWN, "eth1": OTHER}, {}, down=("eth1",))
    assert network.interface_to("host0") == "eth0"


@pytest.mark.parametrize(("environment", "expected"), [
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True), ({"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, True),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False), ({"WORLD_SIZE": "2"}, False), ({}, False)])
def test_spans_hosts(monkeypatch, environment, expected):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert network.spans_hosts() == expected


def test_processes_that_nobody_told_apart_do_not_train(monkeypatch):
    for name in ("RANK", *network.OTHER_LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    network.check_launcher()
    for name in network.OTHER_LAUNCHERS:
        monkeypatch.setenv(name, "1")
        network.check_launcher()
        monkeypatch.setenv(name, "4")
        with pytest.raises(ConfigError, match=f"{name}=4"):
            network.check_launcher()
        monkeypatch.setenv("RANK", "0")  # torchrun under srun
        network.check_launcher()
        monkeypatch.delenv("RANK")
        monkeypatch.delenv(name)


def test_an_unknown_name_has_no_route():
    assert network._source_address("no-such-host.invalid") is None


def test_restarts_over_several_hosts_need_a_store_of_each_attempts_own(monkeypatch):
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_MAX_RESTARTS", "3"), ("GROUP_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert network.shares_store()  # one host: the engine separates the attempts
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        network.shares_store()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert network.shares_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # what that variable leads to
    assert not network.shares_store()

"""How the ranks of a job find each other: whether a launcher said who they are, and which interface reaches the other hosts.

gloo, left alone, takes the address of the host's own name. On Debian and its kin that is 127.0.1.1, which no other host reaches. NCCL
chooses well by itself.
"""

import ipaddress
import os
import socket

import psutil

from gpr_dist.errors import ConfigError

ANYWHERE = "192.0.2.1"  # RFC 5737: belongs to nobody; asking for the route to it sends nothing
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""how mpirun, mpiexec and srun say how many processes they started"""


def check_launcher() -> None:
    """Raises: ConfigError when something started several of us without telling torch: each would train alone, in the same run folder."""
    for name in OTHER_LAUNCHERS:
        if "RANK" not in os.environ and int(os.environ.get(name, 1)) > 1:
            raise ConfigError(f"{name}={os.environ[name]}, but RANK is not set: so many runs in one folder; start torchrun once "
                              "per host (launch/cluster.md)")


def shares_store() -> bool:
    """Whether torchrun's ranks meet in a store that outlives their restart, with the addresses of the dead in it (PyTorch 2.13; 2.11 and
    2.12 were not looked at).

    Raises: ConfigError where ranks of several hosts may be restarted: only torchrun itself could give each attempt a store of its own.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ConfigError("torchrun --max-restarts on several hosts: restarted ranks would look for the dead ones in the store they "
                          "share; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun (launch/cluster.md)")
    return shared


def spans_hosts() -> bool:
    """Whether the launcher (torchrun or deepspeed) started ranks of this job on other hosts too."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return here is not None and int(here) < int(os.environ.get("WORLD_SIZE", here))


def interface_to(host: str) -> str | None:
    """Name of the interface whose address this host shows to `host` (a name or an address).

    `host` itself, which may know its own name as a loopback address only, takes the interface of the default route, or else its only
    one. Returns: None where that does not decide.
    """
    candidates = external_addresses()
    for target in (host, ANYWHERE):
        if (address := _source_address(target)) in candidates:
            return candidates[address]
    names = set(candidates.values())
    return names.pop() if len(names) == 1 else None


def external_addresses() -> dict[str, str]:
    """Addresses of this host that others may reach, with their interfaces: up, neither loopback nor link-local."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if name in up and entry.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(entry.address):
                found[entry.address] = name
    return found


def _is_local(address: str) -> bool:
    parsed = ipaddress.ip_address(address.split("%")[0])
    return parsed.is_loopback or parsed.is_link_local


def _source_address(target: str) -> str | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(target, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: looks up the route, sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None

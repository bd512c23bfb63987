"""Two or more "hosts" on one machine: network, process, mount and host-name namespaces joined by a switch, each with its own sshd.

    with hosts(2, tmp_path / "hosts") as (first, second):
        first.run(["ssh", "host1", "hostname"])                # waits; CompletedProcess with text; AssertionError on a non-zero exit
        job = first.start(["torchrun", ...], cwd=folder, env=environment, stdout=..., stderr=...)      # a Popen
        second.cut(); second.restore()                         # its cable: frames vanish silently, as in a broken switch; nobody sees a FIN
        second.slow("2mbit"); second.restore()                 # both directions; a queue of up to a second, then loss
        second.kill()                                          # power loss: first the cable, then every process of it at once

A host is called host0, host1 ...; `Host.address` is its IPv4 address, the same in every host's /etc/hosts; `write_hostfile` makes
DeepSpeed's hostfile. All hosts see this machine's files, so any folder is a shared folder. Root's ssh goes from each to each
without a password, with keys that live in `folder` only; an ssh session has a clean environment, as on a real cluster. As on Debian,
a host's own name is 127.0.1.1 to itself. Processes of a host are ordinary processes seen from outside (/proc, os.kill, members_of), but
they cannot be reached by network from outside. When the `with` block ends, or the test process dies in whatever way, the kernel
removes all of it: nothing here has a name outside its processes.

Needs root and Debian's iproute2, util-linux, openssh-server, pdsh; `hosts` skips the test with the reason where these are missing.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "setpriv": "util-linux",
            "ssh": "openssh-client", "ssh-keygen": "openssh-client", "sshd": "openssh-server", "pdsh": "pdsh"}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]  # never outlives the test process
NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
PATIENCE_S = 20

INIT = """set -e
name=$1 address=$2 etc=$3
echo "$name" > /proc/sys/kernel/hostname
mount --bind "$etc/hosts" /etc/hosts
mount --bind "$etc/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mkdir /run/sshd
until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -e
"""
SSHD_CONFIG = """HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PidFile {folder}/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
MaxStartups 100
"""
SSH_CONFIG = """Host *
  IdentityFile /etc/ssh/key
  UserKnownHostsFile /etc/ssh/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  LogLevel ERROR
"""


def why_not() -> str | None:
    """Why this machine cannot make hosts; none = it can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    missing = {package for program, package in PROGRAMS.items() if not shutil.which(program, path=SYSTEM_PATH)}
    if missing:
        return f"missing packages: apt-get install {' '.join(sorted(missing))}"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One of the hosts; made by `hosts`."""

    def __init__(self, number: int, folder: Path, switch: int) -> None:
        self.name, self.address = f"host{number}", f"10.77.0.{number + 1}"
        self.hosts_line = f"{self.address} {self.name}\n"
        self.folder = folder
        self._port, self._switch = f"port{number}", switch
        self._process: subprocess.Popen | None = None

    def start(self, command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None, **popen: Any) -> subprocess.Popen:
        """Start a command there, in a session of its own. Signals to the Popen reach only its wrapper: use `members_of`, `kill`."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", "--"]
        return subprocess.Popen([*inside, "env", f"--chdir={cwd or self.folder}", *command], env=env, start_new_session=True, **popen)

    def run(self, command: list[str], timeout: float = 60, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end and collect its output; `options` as of `start`."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert not check or process.returncode == 0, f"{self.name}: {' '.join(command)} ended with {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @property
    def pid(self) -> int:
        """Process id, seen from outside, of the first process of the host (its sshd)."""
        parent = self._process.pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def cut(self) -> None:
        """Pull its cable: no frame gets through, no process is told."""
        self._at_switch("ip", "link", "set", self._port, "nomaster")

    def restore(self) -> None:
        """Plug the cable in again, at full speed."""
        self._at_switch("ip", "link", "set", self._port, "master", "switch")
        self._at_switch("tc", "qdisc", "del", "dev", self._port, "root", check=False)
        self.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=False)

    def slow(self, rate: str = "2mbit") -> None:
        """Limit its cable to `rate` (as tc writes it) in both directions; a token bucket, because not every kernel has netem's delay."""
        limit = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "1s"]
        self._at_switch("tc", "qdisc", "replace", "dev", self._port, *limit)
        self.run(["tc", "qdisc", "replace", "dev", "eth0", *limit])

    def kill(self) -> None:
        """Switch it off: the others see silence, no closed connection."""
        self.cut()
        os.kill(self.pid, signal.SIGKILL)  # process 1 of its namespace: the kernel ends all others with it
        self._process.wait(PATIENCE_S)

    def _boot(self, etc: Path) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n" + (etc / "hosts").read_text())
        shutil.copytree(etc / "ssh", self.folder / "ssh")
        (self.folder / "ssh" / "key").chmod(0o600)
        (self.folder / "ssh" / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        with open(self.folder / "sshd.log", "w") as log:
            self._process = subprocess.Popen([*WITH_PARENT, *NAMESPACES, "sh", "-c", INIT, "sh", self.name, self.address, str(self.folder)],
                                             stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        _wait(lambda: _is_apart(self._process), self._process)
        self._at_switch("ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self._process.pid))
        self._at_switch("ip", "link", "set", self._port, "master", "switch", "up")

    def _wait_until_up(self) -> None:
        _wait((self.folder / "sshd.pid").exists, self._process, self.folder / "sshd.log")

    def _off(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # unshare passes it on to the host's first process
            self._process.wait(PATIENCE_S)

    def _at_switch(self, *command: str, check: bool = True) -> None:
        _run("nsenter", "--target", str(self._switch), "--net", "--", *command, check=check)


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` running hosts that reach each other by name; `folder` (new) holds their keys and sshd logs. Skips where impossible."""
    if reason := why_not():
        pytest.skip(reason)
    etc = folder.resolve() / "etc"
    (etc / "ssh").mkdir(parents=True)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(etc / "ssh" / "key"))
    (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG)
    made: list[Host] = []
    switch = subprocess.Popen([*WITH_PARENT, "unshare", "--net", "sleep", "infinity"], start_new_session=True)
    try:
        _wait(lambda: _is_apart(switch), switch)
        _run("nsenter", "--target", str(switch.pid), "--net", "--", "ip", "link", "add", "switch", "up", "type", "bridge")
        made = [Host(number, folder.resolve() / f"host{number}", switch.pid) for number in range(count)]
        (etc / "hosts").write_text("".join(host.hosts_line for host in made))
        key = (etc / "ssh" / "key.pub").read_text()
        (etc / "ssh" / "known_hosts").write_text("".join(f"{host.name},{host.address} {key}" for host in made))
        for host in made:
            host._boot(etc)
        for host in made:
            host._wait_until_up()
        yield made
    finally:
        for host in made:
            host._off()
        switch.kill()
        switch.wait(PATIENCE_S)


def write_hostfile(path: Path, used: list[Host], slots: int = 1) -> Path:
    """A hostfile of DeepSpeed: a line per host, `slots` ranks on each."""
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in used))
    return path


def _is_apart(process: subprocess.Popen) -> bool:
    """Whether it has left this process's network: before, its interfaces would be ours."""
    return os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _wait(condition: Any, process: subprocess.Popen, log: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        said = log.read_text() if log else ""
        assert process.poll() is None, f"a host ended while it was started: {process.args}\n{said}"
        assert time.monotonic() < deadline, f"a host did not start within {PATIENCE_S} s: {process.args}\n{said}"
        time.sleep(0.02)


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

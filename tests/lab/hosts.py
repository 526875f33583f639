"""Several hosts on one machine, with a network of their own that has no way out.

A host is a set of Linux namespaces: its own processes, mounts, name and network, joined to the
others by a bridge. It has its own /root, /tmp, /run, /dev/shm, /etc/hosts and sshd; /mnt is storage
that all of them share, and everything else, programs and libraries above all, is the machine's. To
kill the first process of a host takes everything on it down at once, as a power cut would.

Needs root and Debian's iproute2, openssh-server, rsync and util-linux.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NETWORK = "10.77.0"
HOSTS: Mapping[str, int] = {"laptop": 10, "head": 11, "worker-1": 12, "worker-2": 13}
FOLDER = Path("/tmp/cpfean-lab")
_SWITCH = "lab-switch"
_INIT = Path(__file__).with_name("init.py")
_PROGRAMS = ("ip", "nsenter", "unshare", "mount", "rsync", "ssh", "ssh-keygen", "/usr/sbin/sshd")


def missing() -> str:
    """What this machine lacks for a lab; empty if nothing."""
    if os.geteuid() != 0:
        return "root"
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} (Debian: openssh-server, iproute2, rsync)"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "true"], capture_output=True
    )
    return "" if tried.returncode == 0 else "the right to make namespaces"


def address(host: str) -> str:
    """The IPv4 address of a host."""
    return f"{NETWORK}.{HOSTS[host]}"


class Lab:
    """The hosts, whether they are up or not.

    Args:
        folder: of all that hosts write; the lab owns it.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    def up(self) -> None:
        """Starts a lab with fresh hosts.

        Raises:
            RuntimeError: one is up already, or the machine lacks something.
        """
        lack = missing()
        if lack:
            raise RuntimeError(f"the lab needs {lack}.")
        if any(self.is_up(host) for host in HOSTS):
            raise RuntimeError("a lab is up already: take it down first.")
        self.down()
        (self.folder / "shared").mkdir(parents=True)
        key = self.folder / "key"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key)
        _run("ip", "netns", "add", _SWITCH)
        _switch("ip", "link", "add", "bridge", "type", "bridge")
        _switch("ip", "link", "set", "bridge", "up")
        for host in HOSTS:
            self._furnish(host)
            self.boot(host)

    def down(self) -> None:
        """Ends every host and removes all that they wrote; does nothing where nothing is."""
        for host in HOSTS:
            self.cut_power(host)
        for name in (*HOSTS, _SWITCH):
            namespace = name if name == _SWITCH else _namespace(name)
            if Path("/run/netns", namespace).exists():
                _run("ip", "netns", "delete", namespace)
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self, host: str) -> None:
        """Starts a host; disk and shared storage are as it left them, /tmp is empty."""
        if self.is_up(host):
            raise RuntimeError(f"{host} is up already.")
        own = self.folder / host
        shutil.rmtree(own / "tmp", ignore_errors=True)
        (own / "tmp").mkdir(mode=0o1777)
        (own / "tmp").chmod(0o1777)
        self._wire(host)
        with (own / "log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *("ip", "netns", "exec", _namespace(host)),
                    *("unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child"),
                    *("--mount-proc", sys.executable, str(_INIT), str(self.folder), host),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(),
            )
        (own / "pid").write_text(str(process.pid), encoding="ascii")
        wait_until(
            lambda: self._first_process(host) is not None and self._answers(host),
            seconds=30,
            what=f"{host} to boot; see {own / 'log'}",
        )

    def cut_power(self, host: str) -> None:
        """Ends everything on a host in the same instant."""
        first = self._first_process(host)
        if first is not None:
            os.kill(first, signal.SIGKILL)
            wait_until(
                lambda: not Path(f"/proc/{first}").exists(), seconds=30, what=f"{host}'s end"
            )
        (self.folder / host / "pid").unlink(missing_ok=True)

    def cut_network(self, host: str) -> None:
        """Pulls the network cable of a host; whatever runs there goes on."""
        _switch("ip", "link", "set", f"to-{host}", "down")

    def join_network(self, host: str) -> None:
        """Puts the cable back in."""
        _switch("ip", "link", "set", f"to-{host}", "up")

    def is_up(self, host: str) -> bool:
        return self._first_process(host) is not None

    def command(self, host: str, command: str) -> list[str]:
        """The command line, for this machine, of a shell command on a host."""
        first = self._first_process(host)
        if first is None:
            raise RuntimeError(f"{host} is down.")
        entered = ["nsenter", f"--target={first}", "--mount", "--pid", "--uts", "--net"]
        variables = [f"{name}={value}" for name, value in _environment().items()]
        return [*entered, "env", "-i", *variables, "bash", "-c", f"cd /root; {command}"]

    def run(
        self, host: str, command: str, *, seconds: float = 600, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell command on a host, as root, in its home folder.

        Raises:
            RuntimeError: it failed; with what it wrote.
        """
        done = subprocess.run(
            self.command(host, command), capture_output=True, text=True, timeout=seconds
        )
        if check and done.returncode != 0:
            raise RuntimeError(
                f"{host}: {command}\nended with {done.returncode}:\n"
                f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def start(self, host: str, command: str, *, log: Path) -> subprocess.Popen[bytes]:
        """Starts a shell command on a host; what it writes goes to a file of this machine."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(host, command), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def processes(self, host: str) -> list[str]:
        """The command lines of all processes on a host, its sshd and first process left out."""
        listed = self.run(host, "ps -eo pid=,args=").stdout.splitlines()
        own = ("sshd", "init.py", "ps -eo")
        return [line.strip() for line in listed if not any(word in line for word in own)]

    def _furnish(self, host: str) -> None:
        own = self.folder / host
        for folder in ("root/.ssh", "tmp"):
            (own / folder).mkdir(parents=True, mode=0o700)
        names = [f"{address(other)} {other}" for other in HOSTS]
        (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        ssh = own / "root/.ssh"
        shutil.copy(self.folder / "key.pub", ssh / "authorized_keys")
        if host == "laptop":
            shutil.copy(self.folder / "key", ssh / "id_ed25519")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own / "host_key")
        (own / "sshd_config").write_text(
            f"ListenAddress {address(host)}\nHostKey /run/host_key\nPidFile none\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n"
            "StrictModes no\nMaxStartups 100\nMaxSessions 100\n"
            "Subsystem sftp /usr/lib/openssh/sftp-server\n"
        )
        # Where cluster.yaml has its virtual environment; the lab cannot install one.
        (own / "root/venv").symlink_to(sys.prefix)

    def _wire(self, host: str) -> None:
        namespace = _namespace(host)
        if Path("/run/netns", namespace).exists():
            _run("ip", "netns", "delete", namespace)
        subprocess.run(  # gone with the namespace, but the kernel takes its time
            ["ip", "netns", "exec", _SWITCH, "ip", "link", "delete", f"to-{host}"],
            capture_output=True,
        )
        _run("ip", "netns", "add", namespace)
        peer = ("peer", "name", "eth0", "netns", namespace)
        _switch("ip", "link", "add", f"to-{host}", "type", "veth", *peer)
        _switch("ip", "link", "set", f"to-{host}", "master", "bridge", "up")
        inside = ("ip", "netns", "exec", namespace, "ip")
        # The same card after a boot: the others remember it.
        card = f"02:00:00:00:00:{HOSTS[host]:02d}"
        _run(*inside, "link", "set", "eth0", "address", card)
        _run(*inside, "address", "add", f"{address(host)}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "link", "set", "lo", "up")

    def _first_process(self, host: str) -> int | None:
        """The id, on this machine, of a host's process 1."""
        try:
            outer = int((self.folder / host / "pid").read_text(encoding="ascii"))
            children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
            command = Path(f"/proc/{outer}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return int(children[0]) if children and b"unshare" in command else None

    def _answers(self, host: str) -> bool:
        probe = f"exec 3<>/dev/tcp/{address(host)}/22"
        return subprocess.run(self.command(host, probe), capture_output=True).returncode == 0


def wait_until(holds: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Waits for something to become true.

    Raises:
        TimeoutError: it has not, in all that time.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def _environment() -> dict[str, str]:
    # Nothing of this machine's session: a host that has just been started knows nothing of it.
    return {
        "HOME": "/root",
        "USER": "root",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "PATH": "/root/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }


def _namespace(host: str) -> str:
    return f"lab-{host}"


def _switch(*command: str) -> None:
    _run("ip", "netns", "exec", _SWITCH, *command)


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}: {done.stderr.strip()}")

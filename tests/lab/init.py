"""What a host of the lab runs first: process 1 of its namespaces. Standard library only.

    python init.py FOLDER NAME

FOLDER/NAME holds the host's own root/, tmp/, hosts and sshd_config; FOLDER/shared is seen as /mnt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    name = sys.argv[2]
    own = folder / name
    subprocess.run(["hostname", name], check=True)
    mount("--make-rprivate", "/")
    # The shared storage first: where it comes from may be below what is hidden next.
    mount("--bind", folder / "shared", "/mnt")
    mount("--bind", own / "hosts", "/etc/hosts")
    mount("-t", "tmpfs", "-o", "mode=755", "none", "/run")
    # Python may have been installed below /root, which is hidden next.
    installed = Path(sys.base_prefix)
    kept = Path("/run/python")
    kept.mkdir()
    mount("--bind", installed, kept)
    mount("--bind", own / "root", "/root")
    if not installed.exists():
        installed.mkdir(parents=True)
        mount("--bind", kept, installed)
    mount("-t", "tmpfs", "-o", "mode=1777,size=2g", "none", "/dev/shm")
    config = Path("/run/sshd_config")
    for file in ("sshd_config", "host_key"):
        shutil.copy(own / file, config.with_name(file))
    config.with_name("host_key").chmod(0o600)
    mount("--bind", own / "tmp", "/tmp")
    Path("/run/sshd").mkdir()
    os.chdir("/root")
    subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", config])
    while True:  # whatever loses its parent becomes ours to bury
        try:
            os.wait()
        except ChildProcessError:
            sys.exit("sshd has ended")


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()

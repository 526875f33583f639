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
    mount("-t", "tmpfs", "-o", "mode=1777,size=2g", "none", "/dev/shm")
    # Python, its packages and this project may lie below what is hidden next.
    needed = [Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[2]]
    for number, place in enumerate(needed):
        Path(f"/run/kept/{number}").mkdir(parents=True)
        mount("--bind", place, f"/run/kept/{number}")
    config = Path("/run/sshd_config")
    for file in ("sshd_config", "host_key"):
        shutil.copy(own / file, config.with_name(file))
    config.with_name("host_key").chmod(0o600)
    mount("--bind", own / "root", "/root")
    mount("--bind", own / "tmp", "/tmp")
    for number, place in enumerate(needed):
        kept = Path(f"/run/kept/{number}")
        # On a host that has been up before, the empty folder of the last time is there.
        if not place.exists() or not place.samefile(kept):
            place.mkdir(parents=True, exist_ok=True)
            mount("--bind", kept, place)
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

"""A Slurm of one machine: munged, slurmctld and a slurmd for each of several nodes, on loopback.

    python tests/slurm/one_machine.py sinfo

runs a command in such a cluster. All its files, sockets and ports are its own; nothing of a Slurm
that may be installed here is touched. The daemons want to be root.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
# Nodes are named by addresses, which need no name service: JAX takes the first for coordinator.
CONFIG = """
ClusterName=one_machine
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2
NodeName=127.0.0.[2-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}-{ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no such cluster here; empty if there can."""
    absent = [name for name in DAEMONS if _path(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    return "" if os.geteuid() == 0 else "the daemons of Slurm want to be root"


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 2) -> Iterator[dict[str, str]]:
    """Starts one in an empty folder with a short path; yields what its commands need to find it."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    config = CONFIG.format(
        folder=folder, host=socket.gethostname(), ports=_free_ports(nodes), last=nodes + 1
    )
    (folder / "slurm.conf").write_text(config)
    # That none is used could not be said before 23.02; this one needs nothing at start.
    plugin = "disabled" if _version() >= 23 else "cgroup/v1"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
    environment = {name: x for name, x in os.environ.items() if not name.startswith("SLURM_")}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons = []

    def start(name: str, *arguments: str) -> None:
        with (folder / f"{name}.{len(daemons)}.out").open("wb") as out:
            command = [str(_path(name)), *arguments]
            daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))

    def ask(*command: str) -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    try:
        start(
            *("munged", "--foreground", "--force", f"--key-file={folder}/key"),
            *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"),
            *(f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
        )
        _wait(lambda: (folder / "munge.socket").exists(), folder)
        start("slurmctld", "-D", "-c", "-f", environment["SLURM_CONF"])
        for node in range(nodes):
            start("slurmd", "-D", "-N", f"127.0.0.{node + 2}", "-f", environment["SLURM_CONF"])
        count = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        _wait(lambda: ask(*count) == f"{nodes}\n", folder)
        yield environment
    finally:
        with contextlib.suppress(AssertionError):
            # Daemons that go first leave what runs behind.
            ask("scancel", "--user=root")
            _wait(lambda: ask("squeue", "--noheader") == "", folder)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _version() -> int:
    """Of Slurm, the year: "slurm-wlm 22.05.8"."""
    command = [str(_path("slurmd")), "-V"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(text.split()[-1].split(".")[0])


def _free_ports(nodes: int) -> tuple[int, int, int]:
    """For slurmctld, and the first and last of neighbours for nodes."""
    for first in range(20000, 30000, nodes + 1):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + nodes + 1):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first, first + 1, first + nodes
    raise AssertionError("no free ports")


def _wait(holds: Callable[[], bool], folder: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            logs = [*folder.glob("*.log"), *folder.glob("*.out")]
            text = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs)
            raise AssertionError(f"no cluster after {seconds} s\n{text}")
        time.sleep(0.1)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)

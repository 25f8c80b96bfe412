"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd as plain processes in a directory of their own.

Both nodes have this host's name as ``NodeHostname`` and ports of their own; ``config_overrides`` lets them claim CPUs
and GPUs that the machine need not have. Nothing outside the directory is read or written, and the daemons end with the
``with`` block.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NODES = ("n1", "n2")
CPUS = 4

CONFIGURATION = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
InactiveLimit=0
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]


@dataclass(frozen=True)
class Cluster:
    """Two nodes that are up."""

    root: Path
    environment: dict[str, str]

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Output of a SLURM command."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Submit a job script; the job's number."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "job", number)))

    def wait_for(self, number: str, states: set[str], *, restarts: int = 0, seconds: float = 300.0) -> dict[str, str]:
        """Until the job is in one of ``states`` and has been restarted ``restarts`` times."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.job(number)
            if job["JobState"] in states and int(job["Restarts"]) >= restarts:
                return job
            time.sleep(0.5)
        raise AssertionError(f"job {number} is not in {states} after {seconds} s: {self.job(number)}\n{self.logs()}")

    def logs(self) -> str:
        """The end of every daemon's log."""
        texts = [f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.root.glob("*.log")]
        return "\n".join(texts)


@contextmanager
def two_nodes(root: Path) -> Iterator[Cluster]:
    """A cluster in ``root`` (a short path: sockets live there)."""
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o755)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (root / name).mkdir()
    ports = free_ports(3)
    host = socket.gethostname().split(".")[0]
    text = CONFIGURATION.format(host=host, ports=ports, user=getpass.getuser(), root=root, cpus=CPUS)
    (root / "slurm.conf").write_text(text)
    for number in range(8):  # SLURM counts a GPU by its device file
        (root / f"gpu{number}").touch()
    (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-7]\n")
    key = root / "munge.key"
    key.write_bytes(os.urandom(256))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": SEARCHED}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={root}/munge.socket"]
    munged += [f"--{name}-file={root}/munged.{name}" for name in ("pid", "log", "seed")]
    commands = [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (root / f"{command[0]}.{len(daemons)}.out.log").open("wb") as output:
                daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            if command is munged:
                _wait_for_file(root / "munge.socket")
        cluster = Cluster(root, environment)
        _wait_until_idle(cluster)
        yield cluster
        cluster.call("scancel", "--state=PENDING", "--user", getpass.getuser(), check=False)
        cluster.call("scancel", "--signal=KILL", "--full", "--user", getpass.getuser(), check=False)
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait_until_idle(cluster: Cluster) -> None:
    deadline = time.monotonic() + 20
    states = ""
    while time.monotonic() < deadline:
        states = cluster.call("sinfo", "--noheader", "-o", "%T %D", check=False)
        if states.split() == ["idle", "2"]:
            return
        time.sleep(0.3)
    raise AssertionError(f"the nodes did not come up: {states!r}\n{cluster.logs()}")


def _wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()

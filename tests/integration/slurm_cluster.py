"""A private Slurm on this machine: controller and nodes as real daemons, every node a uts, mount and pid namespace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "nsenter")
CONTROLLER_PORT, NODE_PORT = 27817, 27820

CONFIG = """
ClusterName=tests
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=8
InactiveLimit=0
MinJobAge=600
KillWait=5
BatchStartTimeout=10
MessageTimeout=8
CompleteWait=0
JobRequeue=1
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/spool/%n/slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmdParameters=config_overrides
"""

SACCT = """#!/bin/bash
# Accounting needs a database; what NeMo-Run asks of it, the controller's memory knows too.
echo 'JobID|JobName|State|ExitCode'
scontrol -o show job "${@: -1}" | sed 's/ JobState=COMPLETING / JobState=RUNNING /' \\
  | sed -nE 's/^JobId=([0-9]+) JobName=([^ ]+) .* JobState=([A-Z_]+) .* ExitCode=([0-9:]+) .*/\\1|\\2|\\3|\\4/p'
"""


def missing_programs() -> list[str]:
    """What is not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class SlurmCluster:
    """Starts ``num_nodes`` nodes of 4 processors; needs root.

    Args:
        root: folder for everything that the daemons write.
        num_nodes: nodes n1, n2, ...
    """

    def __init__(self, root: Path, num_nodes: int) -> None:
        self.root = root
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{root}/bin:{os.environ['PATH']}:/usr/sbin",
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("log", "run", "state", "spool", "munge", "bin"):
            (root / name).mkdir(parents=True)
        (root / "bin" / "sacct").write_text(SACCT)
        (root / "bin" / "sacct").chmod(0o755)
        (root / "munge").chmod(0o755)
        key = root / "key" / "munge.key"
        key.parent.mkdir(mode=0o700)
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._write_config()
        self._start_daemons(key)

    def _write_config(self) -> None:
        freezer = Path("/sys/fs/cgroup/freezer/cgroup.procs")
        proctrack = "cgroup" if os.access(freezer, os.W_OK) else "pgid"
        if proctrack == "cgroup":
            (self.root / "cgroup.conf").write_text(
                "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n"
            )
        text = CONFIG.format(root=self.root, port=CONTROLLER_PORT, node_port=NODE_PORT, proctrack=proctrack)
        shape = "CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
        for number, node in enumerate(self.nodes, start=1):
            text += f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={NODE_PORT + number} {shape}\n"
        text += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        text += f"FirstJobId={int(time.time()) // 5 % 6_000_000 + 1000}\n"
        (self.root / "slurm.conf").write_text(text)
        names = "".join(f"127.0.0.1 {name}\n" for name in ("ctl", *self.nodes))
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + names)

    def _start_daemons(self, key: Path) -> None:
        self._spawn(
            "munged",
            f"munged --foreground --num-threads=2 --key-file={key} --seed-file={self.root}/key/seed "
            f"--socket={self.root}/munge/socket --pid-file={self.root}/run/munged.pid "
            f"--log-file={self.root}/log/munged.log",
        )
        self._wait_until(lambda: (self.root / "munge" / "socket").exists(), "munge has no socket")
        self._spawn("ctl", f"unshare --uts --mount sh -c '{self._names('ctl')} exec slurmctld -D -c'")
        for node in self.nodes:
            self.start(node)
        self._wait_until(lambda: self.run("sinfo -h -o %t").split() == ["idle"], "the nodes did not come up")

    def _names(self, host: str) -> str:
        return f"hostname {host}; mount --bind {self.root}/hosts /etc/hosts;"

    def _spawn(self, name: str, command: str) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, node: str) -> None:
        """Boots a node."""
        (self.root / "spool" / node).mkdir(exist_ok=True)
        body = f"{self._names(node)} mount -t tmpfs -o size=1g tmpfs /dev/shm; slurmd -D -N {node} & wait"
        namespaces = "unshare --uts --mount --pid --fork --mount-proc --kill-child"
        self._spawn(node, f"{namespaces} bash -c '{body}'")

    def crash(self, node: str) -> None:
        """Power loss: everything on the node is gone at once."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()

    def ensure_running(self, node: str) -> None:
        """Boots a node that has crashed, and waits for it."""
        if node not in self._processes:
            self.start(node)
        self._wait_until(lambda: self.run(f"sinfo -h -n {node} -o %t").split() == ["idle"], f"{node} is not idle")

    def expand(self, nodes: str) -> list[str]:
        """Names in a node list such as n[1-2]."""
        return self.run(f"scontrol show hostnames '{nodes}'").split()

    def inside(self, node: str, command: str) -> str:
        """Runs a command on a node; returns what it prints."""
        namespace_owner = self._processes[node].pid
        (first,) = Path(f"/proc/{namespace_owner}/task/{namespace_owner}/children").read_text().split()
        return self.run(f"nsenter -t {first} -a {command}")

    def run(self, command: str, cwd: Path | None = None) -> str:
        """Output of a shell command with this cluster's Slurm."""
        result = subprocess.run(
            ["bash", "-c", command], env=self.environment, capture_output=True, text=True, timeout=60, cwd=cwd
        )
        return result.stdout

    def state(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run(f"scontrol -o show job {job}").partition("\n")[0]))

    def wait(self, job: str, timeout_seconds: float) -> dict[str, str]:
        """The job's last state, when it has ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._wait_until(lambda: self.state(job).get("JobState") in ended, f"job {job} does not end", timeout_seconds)
        return self.state(job)

    def _wait_until(self, condition: Callable[[], bool], problem: str, timeout_seconds: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = self.run(f"tail -n 5 {self.root}/log/*")
                raise TimeoutError(f"{problem}\n{logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends every daemon and everything that runs on the nodes."""
        self.run("timeout 3 scancel --user=$(id -un)")
        for node in [name for name in self._processes if name in self.nodes]:
            self.crash(node)
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for node in self.nodes:
            self.run(f"find /sys/fs/cgroup/freezer/slurm_{node} -depth -type d -exec rmdir {{}} + 2>/dev/null")

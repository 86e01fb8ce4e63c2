"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, ended by their process ids.

Both nodes are this host. Processes of different nodes are told apart by SLURMD_NODENAME in their environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[3]
NODES = ("n0", "n1")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_START_LIMIT_S = 60.0
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
# cred_expire: a requeued job waits for it. SlurmdTimeout: a node that does not answer is down. KillWait: from SIGTERM
# to SIGKILL. The defaults are 120, 300 and 30 seconds.
_CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={controller}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=15
KillWait=10
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={n0} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """The daemons; a context manager that leaves none of their processes behind.

    Args:
        folder: of their state and logs.
    """

    def __init__(self, folder: Path) -> None:
        missing = [program for program in _PROGRAMS if _find(program) is None]
        assert not missing, f"not installed: {', '.join(missing)}; `make test-slurm` installs them (Debian's packages)"
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._configuration = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self._configuration)}

    def __enter__(self) -> Cluster:
        (self._folder / "state").mkdir(parents=True)
        ports = dict(zip(("controller", *NODES), _free_ports(1 + len(NODES)), strict=True))
        host = socket.gethostname().split(".")[0]
        self._configuration.write_text(_CONFIG.format(folder=self._folder, host=host, **ports))
        (self._folder / "munge.key").write_bytes(os.urandom(128))
        (self._folder / "munge.key").chmod(0o400)
        try:
            self._start_munge()
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self._call("scancel", "--user=root", "--full", "--signal=KILL")
            with suppress(AssertionError):
                wait_until(lambda: not self._call("squeue", "--noheader"), 60.0, lambda: "jobs do not end")
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            if name in self._daemons:
                self._daemons[name].terminate()
                self._daemons.pop(name).wait(30)
        assert self.processes() == []

    def start_node(self, node: str) -> None:
        """Begin its slurmd."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def freeze_node(self, node: str) -> None:
        """Its slurmd and all that runs on the node stop as they are: to everybody else it has lost its power."""
        for pid in (self._daemons[node].pid, *(process.pid for process in self.processes(node))):
            os.kill(pid, signal.SIGSTOP)

    def kill_node(self, node: str) -> None:
        """SIGKILL to its slurmd and all that runs on the node."""
        daemon = self._daemons.pop(node, None)
        if daemon is None:
            return
        while members := [daemon.pid, *(process.pid for process in self.processes(node))]:
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if daemon.poll() is not None and not self.processes(node):
                break
            time.sleep(0.05)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """That live on the node, slurmstepd included; on all nodes, and the jobs' own, when None."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                is_ours = environment.get("SLURM_CONF") == str(self._configuration)
                is_there = node is None or environment.get("SLURMD_NODENAME") == node or _is_stepd_of(process, node)
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_ours and is_there and is_alive and process.pid != os.getpid():
                    found.append(process)
        return found

    def ranks(self, node: str) -> list[psutil.Process]:
        """The trainer's ranks there."""
        return [process for process in self.processes(node) if "LOCAL_RANK" in process.environ()]

    def submit(self, log: Path, arguments: list[str], *, flags: list[str] | None = None, **environment: str) -> Job:
        """``sbatch slurm/train.sh ARGUMENTS``, as a user calls it."""
        command = ["sbatch", "--parsable", f"--output={log}", *(flags or []), "slurm/train.sh", *arguments]
        answer = subprocess.run(
            command, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
        return Job(self, int(answer.stdout), log)

    def call(self, *command: str) -> str:
        """What one of Slurm's commands answers."""
        answer = self._call(*command)
        assert answer is not None, f"{' '.join(command)} failed"
        return answer

    def log(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in self._folder.glob("*.log"))

    def _call(self, *command: str) -> str | None:
        answer = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    def _start_munge(self) -> None:
        socket_file = self._folder / "munge.socket"
        names = {"socket": socket_file, "key-file": self._folder / "munge.key"}
        names |= {f"{kind}-file": self._folder / f"munged.{kind}" for kind in ("pid", "log", "seed")}
        # force: pytest's folders are closed to others, which munged would refuse; its only users are root's.
        self._start("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in names.items()))
        wait_until(socket_file.exists, _START_LIMIT_S, self.log)

    def _start(self, program: str, *arguments: str, name: str = "") -> None:
        path = _find(program)
        assert path is not None
        with (self._folder / f"{name or program}.out.log").open("ab") as stream:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _wait_until_idle(self) -> None:
        wait_until(
            lambda: self._call("sinfo", "--noheader", "--states=idle", "--format=%D") == str(len(NODES)),
            _START_LIMIT_S,
            self.log,
        )


class Job:
    """A submitted job.

    Attributes:
        number: its id.
        log: its output, of all of its starts.
    """

    def __init__(self, cluster: Cluster, number: int, log: Path) -> None:
        self._cluster = cluster
        self.number = number
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def show(self, field: str) -> str:
        """Of ``scontrol show job``."""
        words = self._cluster.call("scontrol", "show", "job", str(self.number), "--oneliner").split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{field}="))

    @property
    def state(self) -> str:
        return self.show("JobState")

    def wait(self, limit_s: float) -> int:
        """Until it is over; its exit code."""
        wait_until(lambda: self.state in _OVER, limit_s, self._report)
        return int(self.show("ExitCode").split(":")[0])

    def wait_for(self, is_reached: Callable[[], bool], limit_s: float) -> None:
        """Until it has come so far; fails when it is over before."""

        def look() -> bool:
            if is_reached():
                return True
            assert self.state not in _OVER, f"it ended before:\n{self._report()}"
            return False

        wait_until(look, limit_s, self._report)

    def signal(self, *flags: str) -> None:
        """By scancel."""
        self._cluster.call("scancel", *flags, str(self.number))

    def _report(self) -> str:
        return f"job {self.number} is {self.state}:\n{self.output[-6000:]}\n{self._cluster.log()}"


def wait_until(is_reached: Callable[[], bool], limit_s: float, report: Callable[[], str]) -> None:
    deadline = time.monotonic() + limit_s
    while not is_reached():
        assert time.monotonic() < deadline, f"not reached after {limit_s} s:\n{report()}"
        time.sleep(0.1)


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _is_stepd_of(process: psutil.Process, node: str) -> bool:
    """Such a process has no SLURMD_NODENAME yet; its title is ``slurmstepd: [12.1]``, its parent slurmd or init."""
    return bool(process.name() == "slurmstepd" and process.environ().get("SLURMD_NODENAME", node) == node)


def _free_ports(num_ports: int) -> list[int]:
    probes = [socket.socket() for _ in range(num_ports)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()

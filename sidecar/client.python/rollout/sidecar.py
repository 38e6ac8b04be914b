"""A sidecar that belongs to this process."""

from __future__ import annotations

import atexit
import collections
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from .address import target
from .client import Rollout
from .errors import SidecarError

_LINES_KEPT = 40
_SETPRIV = "/usr/bin/setpriv"


class Sidecar:
    """``rollout serve`` on a Unix socket: ready when ``start`` returns; ends when it is stopped or this process ends.

        with Sidecar.start("models/Qwen3-0.6B") as sidecar, sidecar.connect() as rollout:
            ...

    If a signal ends this process, the sidecar ends too where setpriv (util-linux) is installed; otherwise it keeps running.
    """

    def __init__(self, command: Sequence[str], socket: Path, stop_timeout: float, on_line: Callable[[str], None] | None) -> None:
        self._socket = socket
        self._stop_timeout = stop_timeout
        self._on_line = on_line
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        self._process: subprocess.Popen[str] | None = None
        self._start_error: OSError | None = None
        self._started, self._ready, self._ended = threading.Event(), threading.Event(), threading.Event()
        # The kernel sends the death signal when the thread that forked ends, not the process. So that thread waits for the child.
        threading.Thread(target=self._run, args=[command], name="sidecar", daemon=True).start()
        self._started.wait()

    @staticmethod
    def start(
        model: str | PathLike[str],
        *,
        program: str | PathLike[str] | None = None,
        socket: str | PathLike[str] | None = None,
        threads: int | None = None,
        arguments: Sequence[str] = (),
        ready_timeout: float = 300.0,
        stop_timeout: float = 10.0,
        on_line: Callable[[str], None] | None = None,
    ) -> Sidecar:
        """Starts a sidecar and returns when it has loaded its model and serves.

        Args:
            model: Folder of a Hugging Face checkpoint.
            program: Path of rollout.dll, run by ``dotnet``, or of the rollout executable. None: ``rollout`` on the PATH.
            socket: Unix socket to listen on. None: a new one in the temporary folder.
            threads: Worker threads of the CPU backend. None: the sidecar's default.
            arguments: Appended to the command line as they are.
            ready_timeout: Seconds that loading the model may take.
            stop_timeout: Seconds that the sidecar may take to stop before it is killed.
            on_line: Gets every line the sidecar prints, on a thread of its own. None: only errors include the last ones.

        Raises:
            SidecarError: It cannot be started, ended before it was ready, or took too long; has the last lines it printed.
        """
        if socket is None:
            socket = Path(tempfile.gettempdir(), f"rollout-{os.getpid()}-{uuid.uuid4().hex[:16]}.sock")
        socket = Path(socket).absolute()
        target(f"unix:{socket}")  # reports a path that is too long before a sidecar is started
        command = [*_program(program), "serve", "--model", os.fspath(model), "--socket", str(socket)]
        if threads is not None:
            command += ["--threads", str(threads)]
        if os.access(_SETPRIV, os.X_OK):
            command = [_SETPRIV, "--pdeathsig", "TERM", "--", *command]

        sidecar = Sidecar([*command, *arguments], socket, stop_timeout, on_line)
        try:
            sidecar._wait_until_ready(ready_timeout)
        except BaseException:
            sidecar.stop()
            raise
        atexit.register(sidecar.stop)
        return sidecar

    @property
    def address(self) -> str:
        """For ``Rollout``."""
        return f"unix:{self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; as in subprocess, minus the signal's number where a signal ended it."""
        return None if self._process is None else self._process.poll()

    @property
    def last_lines(self) -> list[str]:
        """The newest lines it printed."""
        return list(self._lines)

    def connect(self) -> Rollout:
        return Rollout(self.address)

    def kill(self) -> None:
        """Kills it and waits until it has ended. For tests."""
        if not self._ended.is_set():
            os.kill(self.pid, signal.SIGKILL)
        self._ended.wait()

    def stop(self) -> None:
        """Sends SIGTERM to the sidecar, and kills it when it takes too long."""
        atexit.unregister(self.stop)
        if self._process is not None:
            self._process.terminate()
            if not self._ended.wait(self._stop_timeout):
                self.kill()
        self._socket.unlink(missing_ok=True)  # a killed sidecar leaves it

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, command: Sequence[str]) -> None:
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        except OSError as error:
            self._start_error = error
            self._ended.set()
            return
        finally:
            self._started.set()
        with self._process as process:
            assert process.stdout is not None
            for line in process.stdout:
                line = line.rstrip("\n")
                self._lines.append(line)
                if line.startswith("ready {"):
                    self._ready.set()
                if self._on_line is not None:
                    self._on_line(line)
        self._ended.set()
        self._ready.set()  # wakes those who wait for it

    def _wait_until_ready(self, timeout: float) -> None:
        if self._start_error is not None:
            raise SidecarError(f"it cannot be run: {self._start_error}") from self._start_error
        if not self._ready.wait(timeout):
            raise SidecarError(f"the sidecar was not ready after {timeout:g} s", last_lines=self.last_lines)
        if self._ended.is_set():
            raise SidecarError(
                f"the sidecar ended with exit code {self.exit_code} before it was ready", exit_code=self.exit_code, last_lines=self.last_lines)


def _program(program: str | PathLike[str] | None) -> list[str]:
    if program is None:
        found = shutil.which("rollout")
        if found is None:
            raise SidecarError("there is no rollout on the PATH: say which program to run, as program='.../rollout.dll'")
        return [found]
    program = os.fspath(program)
    if not os.path.isfile(program):
        raise SidecarError(f"there is no program {program}")
    if not program.endswith(".dll"):
        return [os.path.abspath(program)]
    host = os.environ.get("DOTNET_HOST_PATH") or shutil.which("dotnet")
    if host is None:
        raise SidecarError("there is no dotnet on the PATH")
    return [host, os.path.abspath(program)]

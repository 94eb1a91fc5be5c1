"""The two JSON protocols, spoken by hand with nothing in between: QMP and the guest agent's."""

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class Wire:
    """A Unix socket with a JSON document on each line."""

    def __init__(self, path: Path, *, timeout: float = 120.0) -> None:
        """Connect, waiting up to `timeout` seconds for someone to listen; each answer may take as long."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lines.close()
        self._socket.close()

    def receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the other side has hung up")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, command: str, **arguments: Any) -> Any:
        """A command's result; events in between are passed over. Raises `RuntimeError` on a refusal."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self.receive()
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]


def negotiate(monitor: Wire) -> None:
    """QMP's greeting and its answer; after it, commands are taken."""
    monitor.receive()
    monitor.ask("qmp_capabilities")


def exec_true(agent: Wire) -> float:
    """Seconds that the agent itself takes to run `true` and to tell its exit code."""
    began = time.perf_counter()
    pid = agent.ask("guest-exec", path="true", **{"capture-output": True})["pid"]
    while not (status := agent.ask("guest-exec-status", pid=pid))["exited"]:
        pass
    if status["exitcode"] != 0:
        raise RuntimeError(f"true ended with {status}")
    return time.perf_counter() - began

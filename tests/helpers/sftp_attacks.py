"""A hostile guest at the port of a shared folder: it speaks SFTP itself, to the server in its jail.

`python -m tests.helpers.sftp_attacks FOLDER ro|rw` serves the folder as this user and writes what came of each attack,
as JSON. A process of its own, so that it can be another user's.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

from atoll.host import folder_server, kernel
from atoll.host.jail import ServedFolder

INIT, OPEN, READ, SETSTAT, MKDIR, REALPATH, STAT, RENAME, SYMLINK, EXTENDED = 1, 3, 5, 9, 14, 16, 17, 18, 20, 200
STATUS, HANDLE, DATA, NAME = 101, 102, 103, 104
FOR_READING, FOR_WRITING, CREATE = 1, 2, 8
PERMISSIONS = 4


def text(value: str) -> bytes:
    return struct.pack(">I", len(value.encode())) + value.encode()


class Client:
    def __init__(self, served: folder_server.Served) -> None:
        self._link = served.link
        self._link.settimeout(10)
        self._number = 0
        self._send(INIT, struct.pack(">I", 3))
        self._receive()

    def _send(self, kind: int, body: bytes) -> None:
        self._link.sendall(struct.pack(">IB", len(body) + 1, kind) + body)

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self._link.recv(count - len(found))
            if not more:
                raise ConnectionError("the server ended")
            found += more
        return found

    def _receive(self) -> tuple[int, bytes]:
        length, kind = struct.unpack(">IB", self._exactly(5))
        return kind, self._exactly(length - 1)

    def ask(self, kind: int, body: bytes) -> tuple[int, bytes]:
        self._number += 1
        self._send(kind, struct.pack(">I", self._number) + body)
        answer, content = self._receive()
        return answer, content[4:]

    def read(self, path: str) -> str:
        """What is in the file, or why not."""
        kind, body = self.ask(OPEN, text(path) + struct.pack(">II", FOR_READING, 0))
        if kind != HANDLE:
            return refusal(kind, body)
        kind, body = self.ask(READ, body + struct.pack(">QI", 0, 4096))
        return body[4:84].decode(errors="replace") if kind == DATA else refusal(kind, body)

    def done(self, kind: int, body: bytes) -> str:
        return refusal(*self.ask(kind, body))


def refusal(kind: int, body: bytes) -> str:
    """`` for what was done."""
    if kind != STATUS:
        return ""
    code = struct.unpack(">I", body[:4])[0]
    length = struct.unpack(">I", body[4:8])[0]
    return "" if code == 0 else body[8 : 8 + length].decode() or f"code {code}"


def mode(bits: int) -> bytes:
    return struct.pack(">II", PERMISSIONS, bits)


def attack(client: Client) -> dict[str, str]:
    client.done(SYMLINK, text("/etc/shadow") + text("absolute"))
    client.done(SYMLINK, text("../../../../etc/shadow") + text("relative"))
    client.done(SYMLINK, text("/") + text("root"))
    created = text("made") + struct.pack(">I", FOR_WRITING | CREATE)
    return {
        "read inside": client.read("inside"),
        "write inside": client.done(OPEN, created + struct.pack(">I", 0)),
        "absolute link": client.read("absolute"),
        "relative link": client.read("relative"),
        "dots": client.read("../../../../etc/shadow"),
        "through a linked root": client.read("root/etc/shadow"),
        "absolute path": client.read("/etc/shadow"),
        "accounts": client.read("/etc/passwd"),
        "a process's memory": client.read("/proc/self/mem"),
        "its environment": client.read("/proc/self/environ"),
        "a device": client.read("device"),
        "hard link to outside": client.done(EXTENDED, text("hardlink@openssh.com") + text("/etc/hostname") + text("h")),
        "rename to outside": client.done(RENAME, text("made") + text("/tmp/atoll-escaped")),
        "write outside": client.done(OPEN, text("/etc/escaped") + struct.pack(">II", FOR_WRITING | CREATE, 0)),
        "write to its library": client.done(OPEN, text("/lib/x") + struct.pack(">II", FOR_WRITING | CREATE, 0)),
        "setuid": client.done(SETSTAT, text("inside") + mode(0o4755)),
        "setgid": client.done(SETSTAT, text("inside") + mode(0o2755)),
        "born setuid": client.done(OPEN, text("born") + struct.pack(">I", FOR_WRITING | CREATE) + mode(0o4755)),
        "folder born setgid": client.done(MKDIR, text("folder") + mode(0o2777)),
        "an honest mode": client.done(SETSTAT, text("inside") + mode(0o600)),
    }


def main(folder: str, access: str, namespaces: bool) -> None:
    if not namespaces:
        folder_server.usable_namespaces = lambda: kernel.Feature(usable=False, why="refused to this user")
    with tempfile.TemporaryDirectory() as logs:
        served = folder_server.serve(ServedFolder(path=folder, read_only=access == "ro"), log=Path(logs, "log"))
        with served.link:
            status = Path(f"/proc/{served.process.pid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines())
            wanted = {name: fields[name].split()[0] for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
            print(json.dumps(wanted | attack(Client(served))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] != ["without-namespaces"])

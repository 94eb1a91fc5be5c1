"""One output stream of a command in the guest: what is data and what the guest tells about it."""

from collections.abc import Callable


class OutputStream:
    """Takes a port's bytes apart: data, the exit code, and the mark that no writer is left.

    The end is made of two random halves that stand together nowhere else in the guest, not even in the command line of
    the process that prints it. The mark is the relay's own (see guest_scripts.py).
    """

    def __init__(self, *, first: str, second: str, mark: str, sink: Callable[[bytes], object]) -> None:
        self._prefix = f"\x1e{first}\x1f{second}".encode()
        self._mark = f"\x1e{mark}\x1e".encode()
        self._sink = sink
        self._rest = b""
        self.code: int | None = None
        self.marks_count = False
        """Whether the mark is one by itself: before the command's end it is data, of a command that reads the file."""
        self.drained = False
        """The relay has told that all writers are gone."""

    @property
    def ended(self) -> bool:
        return self.code is not None

    def feed(self, data: bytes) -> None:
        """Take the next bytes. The data among them go to the sink."""
        self._rest += data
        while self._step():
            pass

    def _step(self) -> bool:
        """Go past the next end or mark; false when there is none yet."""
        at = self._rest.find(self._prefix)
        mark_at = self._rest.find(self._mark) if self.ended or self.marks_count else -1
        if mark_at >= 0 and (at < 0 or mark_at < at):
            self._give(self._rest[:mark_at])
            self._rest = self._rest[mark_at + len(self._mark) :]
            self.drained = True
            return False
        if at < 0:
            held = self._held_back()
            self._give(self._rest[: len(self._rest) - held])
            self._rest = self._rest[len(self._rest) - held :]
            return False
        self._give(self._rest[:at])
        self._rest = self._rest[at:]
        end = self._rest.find(b"\x1e", len(self._prefix))
        if end < 0:
            return False
        told = self._rest[len(self._prefix) : end]
        self._rest = self._rest[end + 1 :]
        if self.code is None and told.isdigit():
            self.code = int(told)
        return True

    def _give(self, data: bytes) -> None:
        # After the end come the words of a process that was left in the background.
        if data and not self.ended:
            self._sink(data)

    def _held_back(self) -> int:
        """How many bytes at the end may be the beginning of something."""
        longest = max(len(self._prefix), len(self._mark)) - 1
        at = self._rest.find(b"\x1e", max(0, len(self._rest) - longest))
        while at >= 0:
            tail = self._rest[at:]
            if self._prefix.startswith(tail) or self._mark.startswith(tail):
                return len(tail)
            at = self._rest.find(b"\x1e", at + 1)
        return 0

"""Every error that the package raises.

An error tells what happened, why, and what to do next; it has a stable `code` for programs. The command line prints
`Error: {what}: {why}. {next_step}`; the HTTP API will carry the same four fields.
"""


class AtollError(Exception):
    """The root of all errors of the package.

    `what` names the thing and what failed, `why` gives the cause, `next_step` says what the reader can do now.
    """

    code = "error"
    exit_code = 1

    def __init__(self, what: str, why: str = "", next_step: str = "") -> None:
        self.what = what
        self.why = why
        self.next_step = next_step
        super().__init__(self.text)

    @property
    def text(self) -> str:
        """The whole error in one line."""
        head = f"{self.what}: {self.why}" if self.why else self.what
        if not self.next_step:
            return head
        return f"{head.rstrip('.')}. {self.next_step}"


class InvalidInput(AtollError):
    """A value given by the user can't be used; nothing was changed."""

    code = "invalid-input"
    exit_code = 2


class NotFound(AtollError):
    """A VM, image, operation, disk … of that name doesn't exist."""

    code = "not-found"
    exit_code = 3


class AlreadyExists(AtollError):
    """The name or the port is taken."""

    code = "already-exists"
    exit_code = 4


class WrongState(AtollError):
    """The VM's phase doesn't allow the verb."""

    code = "wrong-state"
    exit_code = 5


class Busy(AtollError):
    """Another operation holds the thing."""

    code = "busy"
    exit_code = 6


class DisksChanged(Busy):
    """The VM's disks aren't any more what they were when the operation was asked for; asking again is enough."""


class Unsupported(AtollError):
    """This QEMU, host or guest can't do it."""

    code = "unsupported"
    exit_code = 7


class NetworkFailed(AtollError):
    """A network can't be brought up, or lost a part of it."""

    code = "network-failed"


class MissingTool(Unsupported):
    """A program that is needed isn't installed."""

    code = "missing-tool"


class Unauthorized(AtollError):
    """Who asks is not known: there is no token, or it is expired, revoked, or of another host."""

    code = "unauthorized"


class Forbidden(AtollError):
    """Who asks is known, and may not do that."""

    code = "forbidden"


class TimedOut(AtollError):
    """Something didn't happen in the time given for it."""

    code = "timed-out"
    exit_code = 8


class ProcessFailed(AtollError):
    """A program that was run ended with an error; the text has a command that can be pasted."""

    code = "process-failed"


class EngineFailed(AtollError):
    """QEMU refused a command, couldn't start, or died."""

    code = "engine-failed"


class GuestFailed(AtollError):
    """The guest agent refused a request or can't be reached."""

    code = "guest-failed"


class ImageRefused(AtollError):
    """An image is damaged, dangerous or of a kind that isn't supported; nothing was kept."""

    code = "image-refused"


class DownloadFailed(AtollError):
    """A download didn't come whole or with the right checksum."""

    code = "download-failed"


class BuildFailed(AtollError):
    """An image couldn't be built."""

    code = "build-failed"


class StorageFailed(AtollError):
    """The disk is full, read-only, or a file can't be read or written."""

    code = "storage-failed"


class RecordsFailed(AtollError):
    """The database is damaged, newer than this Atoll, or can't be opened."""

    code = "records-failed"


class Cancelled(AtollError):
    """The operation was cancelled and undone."""

    code = "cancelled"
    exit_code = 130


class OperationStuck(AtollError):
    """An undo failed: the operation keeps its evidence and waits for `atoll operation retry` or `cancel`."""

    code = "stuck"
    exit_code = 9


def from_os_error(error: OSError, doing: str) -> StorageFailed:
    """Tell an `OSError` as the user should read it. `doing` says what was tried: "write /x/y"."""
    import errno

    next_step = {
        errno.ENOSPC: "Free some space (`atoll prune`), then try again.",
        errno.EDQUOT: "Your disk quota is used up: free some space, then try again.",
        errno.EROFS: "The file system is read-only: set ATOLL_HOME to a folder that can be written.",
        errno.EACCES: "Check the owner and the mode of that path, or set ATOLL_HOME to a folder of yours.",
        errno.EPERM: "Check the owner and the mode of that path, or set ATOLL_HOME to a folder of yours.",
        errno.EMFILE: "Raise the limit of open files: `ulimit -n 4096`.",
    }.get(error.errno or 0, "")
    why = error.strerror or str(error)
    if error.filename:
        why = f"{why} ({error.filename})"
    return StorageFailed(f"can't {doing}", why, next_step)

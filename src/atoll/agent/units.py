"""The systemd units: one runs the agent, one stops all VMs before the computer goes down."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.errors import NotFound, from_os_error
from atoll.host import files

AGENT, VMS = "atoll.service", "atoll-vms.service"
TIME_TO_STOP = 90
"""Seconds in which all VMs are stopped."""
_KILL_TIME = 30
"""Seconds beyond, in which those that hang are switched off."""


class Place(Struct, frozen=True, kw_only=True):
    """Whose systemd."""

    folder: Path
    target: str
    user: bool

    @property
    def systemctl(self) -> str:
        return "systemctl --user" if self.user else "systemctl"


def place(*, user: bool) -> Place:
    """The system's for root, unless its user's is wanted; an ordinary user's own."""
    if os.getuid() == 0 and not user:
        return Place(folder=Path("/etc/systemd/system"), target="multi-user.target", user=False)
    configuration = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not configuration.is_absolute():
        configuration = Path("~/.config").expanduser()
    return Place(folder=configuration / "systemd/user", target="default.target", user=True)


def install(where: Place, options: Sequence[str]) -> list[Path]:
    """Write the units; the agent is served with these options. Returns what was written. Raises `StorageFailed`."""
    command, environment = _command(), _environment()
    texts = {
        AGENT: agent_unit(where, [command, "serve", *options], environment),
        VMS: vms_unit(where, [command, "shutdown", "--timeout", f"{TIME_TO_STOP}s"], environment),
    }
    try:
        where.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, f"make the folder {where.folder}") from error
    for name, text in texts.items():
        files.write_atomically(where.folder / name, text.encode(), mode=0o644)
    return [where.folder / name for name in texts]


def uninstall(where: Place) -> list[Path]:
    """Remove the units, and the links of `systemctl enable`. Returns what was there. Raises `StorageFailed`."""
    there = [
        path
        for name in (AGENT, VMS)
        for path in (where.folder / f"{where.target}.wants" / name, where.folder / name)
        if path.is_symlink() or path.exists()
    ]
    for path in there:
        try:
            path.unlink()
        except OSError as error:
            raise from_os_error(error, f"remove {path}") from error
    return there


def agent_unit(where: Place, command: Sequence[str], environment: dict[str, str]) -> str:
    """VMs are children of the agent's unit: with `process`, they stay when the agent ends or is started anew."""
    return f"""\
[Unit]
Description=Atoll's agent: watches over virtual machines and serves their API
After=network.target

[Service]
Type=notify
NotifyAccess=main
{_told(environment)}ExecStart={_line(command)}
Restart=always
RestartSec=1
KillMode=process
TimeoutStopSec=75
Delegate=yes
OOMPolicy=continue
TasksMax=infinity
{"" if where.user else "LimitNOFILE=524288" + chr(10)}
[Install]
WantedBy={where.target}
"""


def vms_unit(where: Place, command: Sequence[str], environment: dict[str, str]) -> str:
    """What starts after the agent and the network is stopped before them, so both are there while guests shut down."""
    return f"""\
[Unit]
Description=Stops Atoll's virtual machines before the computer goes down
After={AGENT} network.target

[Service]
Type=oneshot
RemainAfterExit=yes
{_told(environment)}ExecStop={_line(command)}
TimeoutStopSec={TIME_TO_STOP + _KILL_TIME}

[Install]
WantedBy={where.target}
"""


def _command() -> str:
    """The command `atoll` of this installation."""
    beside = Path(sys.executable).with_name("atoll")
    found = str(beside) if beside.exists() else shutil.which("atoll")
    if found is None:
        raise NotFound("the command `atoll` wasn't found", f"it isn't beside {sys.executable}", "Put it into PATH.")
    return found


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("ATOLL_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME") if name in os.environ}


def _told(environment: dict[str, str]) -> str:
    return "".join(f"Environment={_word(f'{name}={value}')}\n" for name, value in environment.items())


def _line(command: Sequence[str]) -> str:
    return " ".join(_word(each).replace("$", "$$") for each in command)


def _word(text: str) -> str:
    """As systemd.syntax(7) quotes: `%` begins a specifier of its own."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if escaped != text or any(each.isspace() or each == "'" for each in text) else text

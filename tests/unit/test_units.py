"""The systemd units that `serve --install` writes, and the word that the agent says to systemd."""

import shutil
import socket
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from atoll.agent import units
from atoll.cli.install import options_of
from atoll.cli.main import cli
from atoll.host.notify import notify


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a user's units are."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/systemd/user"


def test_units_are_written_told_and_removed(home: Path, systemd: Path) -> None:
    done = CliRunner().invoke(cli, ["serve", "--install", "--user"])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "systemctl --user daemon-reload",
        "systemctl --user enable --now atoll.service atoll-vms.service",
        "loginctl enable-linger",
    ]
    assert f"wrote {systemd}/atoll.service" in done.stderr
    agent, vms = ((systemd / name).read_text() for name in (units.AGENT, units.VMS))
    assert "Type=notify" in agent
    assert "KillMode=process" in agent, "its VMs stay when it ends"
    assert f"Environment=ATOLL_HOME={home}" in agent
    assert "/atoll serve\n" in agent
    assert "/atoll shutdown --timeout 90s\n" in vms
    assert "After=atoll.service" in vms, "so it is stopped before"

    wants = systemd / "default.target.wants"
    wants.mkdir()
    (wants / units.AGENT).symlink_to(systemd / units.AGENT)
    done = CliRunner().invoke(cli, ["serve", "--uninstall", "--user"])
    assert done.exit_code == 0
    assert [path for path in systemd.rglob("*") if path != wants] == []
    assert "there are no units" in CliRunner().invoke(cli, ["serve", "--uninstall", "--user"]).stderr
    assert CliRunner().invoke(cli, ["serve", "--uninstall", "--install"]).exit_code == 2


def test_other_options_of_serve_are_the_units(home: Path) -> None:
    found = []

    @click.command()
    @click.option("--install", is_flag=True)
    @click.option("--listen", "-l", multiple=True)
    @click.option("--name", default="unasked")
    @click.option("--plain", is_flag=True)
    @click.pass_context
    def serve(ctx: click.Context, **options: object) -> None:
        found.extend(options_of(ctx))

    CliRunner().invoke(serve, ["--install", "-l", ":1", "--listen", ":2", "--plain"])
    assert found == ["--listen", ":1", "--listen", ":2", "--plain"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze isn't installed")
@pytest.mark.parametrize("user", [False, True])
def test_systemd_accepts_them(tmp_path: Path, user: bool) -> None:
    where = units.Place(folder=tmp_path, target="multi-user.target", user=user)
    written = units.install(where, ["--name", 'it\'s "100%" of $HOME'])
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", *(["--user"] if user else []), *map(str, written)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert [line for line in checked.stderr.splitlines() if "atoll" in line] == []
    assert 'ExecStart="' not in (tmp_path / units.AGENT).read_text()
    assert 'serve --name "it\'s \\"100%%\\" of $$HOME"' in (tmp_path / units.AGENT).read_text()


def test_systemd_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert server.recv(100) == b"READY=1"
    notify("STOPPING=1")

"""Package sources come from the machine's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from atoll.errors import BuildFailed, Unsupported
from atoll.images import packages
from atoll.images.packages import Origin, find_origin, locate, open_archive
from atoll.layout import Layout

# A real apt is asked about these sources; it touches no network to list them.
DEB822 = """\
Types: deb
URIs: http://mirror.invalid/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://security.invalid/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: https://elsewhere.invalid/vendor
Suites: nodistro
Components: main
"""
ONE_LINE = """\
# deb http://old.invalid/debian bookworm main
deb [arch=amd64] http://mirror.invalid/debian/ stable main
deb http://security.invalid/debian-security stable-security main
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the sources of an apt that is Debian 12's, whatever this machine is."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "state" / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list"; Dir::Etc::sourceparts "{tmp_path}/parts";'
        f'Dir::State "{tmp_path}/state"; Acquire::http::Proxy "http://proxy.invalid:3128";'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setattr(packages, "_os_release", lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"})
    return tmp_path


@pytest.mark.parametrize(("name", "content"), [("parts/debian.sources", DEB822), ("sources.list", ONE_LINE)])
async def test_the_mirror_is_found_in_either_format(apt: Path, name: str, content: str) -> None:
    (apt / name).write_text(content)
    origin = await find_origin()
    assert origin.mirror == "http://mirror.invalid/debian"
    assert origin.security == "http://security.invalid/debian-security"
    assert 'Acquire::http::Proxy "http://proxy.invalid:3128";' in origin.settings


async def test_sources_without_the_release_are_told(apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://elsewhere.invalid/vendor nodistro main\n")
    with pytest.raises(BuildFailed, match="don't name bookworm"):
        await find_origin()


async def test_another_system_is_told_to_pull_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_os_release", lambda: {"ID": "fedora", "PRETTY_NAME": "Fedora 42"})
    with pytest.raises(Unsupported, match=r"Fedora 42.*image pull"):
        await find_origin()


def origin(**changes: str | None) -> Origin:
    values = {"distribution": "debian", "codename": "bookworm", "mirror": "http://m.invalid/d", "security": None}
    return Origin(**{**values, **changes}, settings=())  # type: ignore[arg-type]


def test_debian_12_also_has_its_backports_and_13_does_not() -> None:
    suites = [line.split()[-2] for line in origin().sources("bookworm")]
    assert suites == ["bookworm", "bookworm-updates", "bookworm-backports"]
    suites = [line.split()[-2] for line in origin(security="http://s.invalid/s").sources("trixie")]
    assert suites == ["trixie", "trixie-updates", "trixie-security"]


async def test_a_mirror_out_of_reach_is_told_with_the_next_step(layout: Layout) -> None:
    # Apt's own pauses between attempts come to 7 s.
    unreachable = replace(origin(mirror="http://127.0.0.1:9/debian"), settings=('Acquire::Retries "0";',))
    with pytest.raises(BuildFailed, match="package lists of trixie for riscv64"):
        await open_archive(layout, unreachable, codename="trixie", arch="riscv64")


async def test_a_package_that_is_not_there_is_told(layout: Layout, tmp_path: Path) -> None:
    archive = packages.Archive(folder=tmp_path, codename="trixie", arch="aarch64", sources=())
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "status").touch()
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "/dev/null"; Dir::State "{tmp_path}";'
        f'Dir::State::status "{tmp_path}/status"; Dir::Cache "{tmp_path}";'
    )
    with pytest.raises(BuildFailed, match="no-such-package can't be had for aarch64"):
        await locate(archive, ["no-such-package"], keep=lambda _: True)

"""Distribution packages without root, and without a trace in the machine's own dpkg and apt.

The machine's apt sources tell which mirror to use; an apt state of our own, one for each release and architecture,
holds the lists. apt itself parses sources (both formats), checks signatures, resolves dependencies and downloads.
"""

import asyncio
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from atoll.errors import AtollError, BuildFailed, ProcessFailed, Unsupported
from atoll.host import process
from atoll.host.files import make_folder, sha256_of, write_atomically
from atoll.images.made import Report
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.operation import Progress
from atoll.model.spec import Arch

DPKG_ARCH: dict[Arch, str] = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}
APT_HELPER = Path("/usr/lib/apt/apt-helper")
DOWNLOADS_AT_ONCE = 4

# Where each distribution keeps the keys of its archive; without them apt's own trusted keys serve.
_KEYRINGS = {
    "debian": (Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
               Path("/usr/share/keyrings/debian-archive-keyring.pgp")),
    "ubuntu": (Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),),
}  # fmt: skip
_COMPONENTS = {"debian": "main", "ubuntu": "main universe"}
# Debian 12's own kernel and guest agent are too old.
_BACKPORTS = {"bookworm": "bookworm-backports"}
# Settings of the machine that say how to reach its mirror: proxies, certificates, a clock that isn't to be trusted.
_CARRIED_SETTINGS = re.compile(
    r"Acquire::(?:https?|ftp|socks5h|tor|Retries|ForceIPv[46]|Check-Valid-Until|Check-Date)\b", re.I
)


@dataclass(frozen=True)
class Origin:
    """The distribution and the mirrors that the machine's own sources name."""

    distribution: str
    """`debian` or `ubuntu`."""
    codename: str
    mirror: str
    security: str | None
    settings: tuple[str, ...]
    """Lines of apt.conf that are needed to reach the mirror."""

    def sources(self, codename: str) -> tuple[str, ...]:
        """The lines of a sources.list for a release."""
        keyring = next((path for path in _KEYRINGS[self.distribution] if path.exists()), None)
        options = f"[signed-by={keyring}] " if keyring else ""
        suites = [(self.mirror, codename), (self.mirror, f"{codename}-updates")]
        if self.security:
            suites.append((self.security, f"{codename}-security"))
        if codename in _BACKPORTS:
            suites.append((self.mirror, _BACKPORTS[codename]))
        components = _COMPONENTS[self.distribution]
        return tuple(f"deb {options}{uri} {suite} {components}" for uri, suite in suites)


@dataclass(frozen=True)
class Archive:
    """An apt state of our own for one release and architecture, with fresh lists."""

    folder: Path
    codename: str
    arch: Arch
    sources: tuple[str, ...]
    """Lines of a sources.list."""

    @property
    def environment(self) -> dict[str, str]:
        return {"APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C"}

    async def apt_get(self, *words: str, check: bool = True) -> process.Finished:
        """Run apt-get on this state; builds that run at the same time wait for each other in `flock`."""
        argv: list[str | Path] = ["flock", self.folder / "lock", "apt-get", *words]
        return await process.run(argv, env=self.environment, check=check)


@dataclass(frozen=True)
class Package:
    """One file of the archive."""

    name: str
    version: str
    uri: str
    file_name: str
    size: int
    sha256: str


async def find_origin() -> Origin:
    """What the machine's sources say, asked of apt. Raises `Unsupported` when it isn't a Debian or Ubuntu."""
    release = _os_release()
    distribution, codename = release.get("ID", ""), release.get("VERSION_CODENAME", "")
    if distribution not in _KEYRINGS or not codename:
        raise Unsupported(
            "images are built from packages on Debian and Ubuntu only",
            f"this is {release.get('PRETTY_NAME', 'another system')}",
            "Pull a published image instead: `atoll image pull debian:13`.",
        )
    printed = await process.run(["apt-get", "update", "--print-uris"], env={"LC_ALL": "C"})
    releases = re.findall(r"^'([^']+?)/?/dists/([^']+)/InRelease'", printed.text, re.MULTILINE)
    suites = {suite: uri for uri, suite in releases}
    # Sources may also follow a release by its rank ("stable").
    ranks = (codename, f"{codename}-updates", "stable", "oldstable", "testing")
    mirror = next((suites[name] for name in ranks if name in suites), None)
    if mirror is None:
        raise BuildFailed(
            "no mirror is known",
            f"the apt sources of this machine don't name {codename}",
            "Mend /etc/apt/sources.list.d.",
        )
    security = next((uri for suite, uri in suites.items() if suite.endswith("-security")), None)
    dump = await process.run(["apt-config", "dump"], env={"LC_ALL": "C"})
    settings = tuple(line for line in dump.text.splitlines() if _CARRIED_SETTINGS.match(line))
    return Origin(
        distribution=distribution, codename=codename, mirror=unquote(mirror), security=security, settings=settings
    )


async def open_archive(layout: Layout, origin: Origin, *, codename: str, arch: Arch) -> Archive:
    """The archive of a release with fresh lists; those of an earlier time serve when the mirror can't be reached.

    Raises `BuildFailed` when there are none, `StorageFailed`.
    """
    folder = make_folder(layout.packages / f"{codename}-{DPKG_ARCH[arch]}")
    make_folder(folder / "lists" / "partial")
    archive = Archive(folder=folder, codename=codename, arch=arch, sources=origin.sources(codename))
    write_atomically(folder / "sources.list", "\n".join([*archive.sources, ""]).encode())
    write_atomically(folder / "status", b"")
    write_atomically(folder / "apt.conf", _apt_conf(folder, origin, codename=codename, arch=arch).encode())
    # apt-get ends well when only the mirror is out of reach: whether there are lists is what counts.
    finished = await archive.apt_get("update", "--quiet", check=False)
    if not any(folder.glob("lists/*_Packages*")):
        raise _no_lists(archive, finished)
    return archive


def _no_lists(archive: Archive, finished: process.Finished) -> BuildFailed:
    """Whose fault it is that there are no lists, in apt's own words, and what the user can do about it."""
    said = finished.stderr.decode(errors="replace")
    refused = re.search(r"^[EW]: Failed to fetch (\S+)\s+(.+)$", said, re.MULTILINE)
    why = f"{refused[1]}: {refused[2]}" if refused else process.failure(["apt-get", "update"], finished).why
    # apt's words for an index that isn't the one that the signed Release file names.
    if re.search("unexpected size|Hash Sum mismatch", why):
        next_step = (
            "The mirror's copy is damaged or half copied: nothing here can mend it. Try again in an hour, or name "
            f"another mirror with {DPKG_ARCH[archive.arch]} in the apt sources of this machine."
        )
    elif "404" in why:
        next_step = f"Name a mirror that carries {DPKG_ARCH[archive.arch]} in the apt sources of this machine."
    else:
        next_step = "Check the network and the machine's apt sources: `sudo apt-get update`."
    return BuildFailed(f"the package lists of {archive.codename} for {archive.arch} can't be had", why, next_step)


def _apt_conf(folder: Path, origin: Origin, *, codename: str, arch: Arch) -> str:
    name = DPKG_ARCH[arch]
    own: dict[str, object] = {
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": folder,
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "APT::Architecture": name,
        "APT::Architectures": name,
        "APT::Install-Recommends": "false",
        # root's apt would download as `_apt`, who can't enter our folders
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::ForceHash": "SHA256",
        "Acquire::Retries": "3",
    }
    if codename in _BACKPORTS:
        own["APT::Default-Release"] = _BACKPORTS[codename]
    lines = [f'{key} "{value}";' for key, value in own.items()]
    return "\n".join([*lines, *origin.settings, ""])


async def locate(archive: Archive, names: Iterable[str], *, keep: Callable[[str], bool]) -> tuple[Package, ...]:
    """The packages of these names and all that they depend on, those that `keep` wants. Raises `BuildFailed`."""
    wanted = sorted(names)
    try:
        printed = await archive.apt_get("install", "--print-uris", "--quiet=2", *wanted)
    except ProcessFailed as error:
        raise BuildFailed(
            f"the packages {', '.join(wanted)} can't be had for {archive.arch}",
            error.why,
            f"Check that the machine's mirror carries {DPKG_ARCH[archive.arch]} of {archive.codename}.",
        ) from error
    packages = []
    for line in printed.text.splitlines():
        uri, file_name, size, digest = shlex.split(line)
        name, version, _ = unquote(file_name).split("_", 2)
        if not digest.startswith("SHA256:"):
            raise BuildFailed(f"the mirror gives no SHA-256 for {name}", "its lists are of an unknown kind")
        if keep(name):
            sha256 = digest.removeprefix("SHA256:")
            packages.append(
                Package(name=name, version=version, uri=uri, file_name=file_name, size=int(size), sha256=sha256)
            )
    return tuple(packages)


async def fetch(layout: Layout, archive: Archive, packages: Iterable[Package], *, report: Report) -> dict[str, Path]:
    """The files of the packages by name, downloaded unless they are in the cache, each with its SHA-256 checked.

    Raises `BuildFailed`, `StorageFailed`.
    """
    wanted = list(packages)
    store = make_folder(layout.packages / "archives")
    total, done = sum(package.size for package in wanted), 0
    slots = asyncio.Semaphore(DOWNLOADS_AT_ONCE)

    async def get(package: Package) -> tuple[str, Path]:
        nonlocal done
        async with slots:
            path = await _cached(archive, store, package)
        done += package.size
        report(Progress(step="download packages", done=done, total=total, unit="bytes"))
        return package.name, path

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(get(package)) for package in wanted]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return dict(task.result() for task in tasks)


async def _cached(archive: Archive, store: Path, package: Package) -> Path:
    final = store / package.file_name
    if final.exists() and await asyncio.to_thread(sha256_of, final) == package.sha256:
        return final
    # A name of its own: another build may be downloading the same package.
    temporary = store / f".{new_id()}.part"
    try:
        await process.run(
            [APT_HELPER, "download-file", package.uri, temporary, f"SHA256:{package.sha256}"], env=archive.environment
        )
        temporary.replace(final)
    except AtollError as error:
        raise BuildFailed(
            f"the package {package.name} can't be downloaded", error.why, "Check the network, then try again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return final


async def unpack(debs: Iterable[Path], folder: Path) -> None:
    """Unpack packages over each other into `folder`, owned by whoever runs this. Raises `BuildFailed`."""
    make_folder(folder)
    for deb in debs:
        try:
            await process.run(["dpkg-deb", "--extract", deb, folder])
        except ProcessFailed as error:
            raise BuildFailed(f"the package {deb.name} can't be unpacked", error.why, error.next_step) from error


def _os_release() -> dict[str, str]:
    for path in (Path("/etc/os-release"), Path("/usr/lib/os-release")):
        if path.exists():
            words = shlex.split(path.read_text(), comments=True)
            return dict(word.split("=", 1) for word in words if "=" in word)
    return {}

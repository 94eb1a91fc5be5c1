"""Official cloud images by name: where each is published, where its checksum is, and how it boots.

The addresses are the publishers' own, as their download pages give them. `catalogue.yaml` in the data folder (see
`Layout.catalogue`) gives a publisher another base address, and adds images:

    publishers:
      debian: https://images.example.org/debian
    images:
      - {name: "corp:1", arch: x86_64, url: "https://example.org/corp.qcow2", checksums: "https://example.org/SHA256SUMS"}
"""

import difflib
from pathlib import Path

import msgspec

from atoll.errors import InvalidInput, NotFound, from_os_error
from atoll.images.addresses import public
from atoll.layout import Layout
from atoll.model.spec import Arch, Firmware

PUBLISHERS = {
    "debian": "https://cloud.debian.org/images/cloud",
    "ubuntu": "https://cloud-images.ubuntu.com/releases",
    "fedora": "https://dl.fedoraproject.org/pub/fedora/linux/releases",
    "alpine": "https://dl-cdn.alpinelinux.org/alpine",
    "rocky": "https://dl.rockylinux.org/pub/rocky",
    "arch": "https://geo.mirror.pkgbuild.com/images",
    "freebsd": "https://download.freebsd.org/releases/VM-IMAGES",
}
BOTH: tuple[Firmware, ...] = ("bios", "uefi")
UEFI: tuple[Firmware, ...] = ("uefi",)
DEBIAN_ARCHES: dict[Arch, str] = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image for one architecture. `url` and `checksums` may begin with `{publisher}`."""

    name: str
    arch: Arch
    url: str
    checksums: str
    """The list that has the file's SHA-256 or SHA-512."""
    firmwares: tuple[Firmware, ...] = BOTH
    """How it boots, the usual way first."""
    agent: bool = False
    """Whether the QEMU guest agent is installed and starts by itself."""
    description: str = ""

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


class Additions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `catalogue.yaml`."""

    publishers: dict[str, str] = {}
    images: tuple[Entry, ...] = ()


def entries(additions: Path) -> tuple[Entry, ...]:
    """All images that can be pulled by name, the user's first. Raises `InvalidInput` for a bad `catalogue.yaml`."""
    added = _read(additions)
    bases = PUBLISHERS | {name: base.rstrip("/") for name, base in added.publishers.items()}
    return tuple(_with_bases(entry, bases) for entry in (*added.images, *_official()))


def find(reference: str, *, arch: Arch, additions: Path) -> Entry:
    """The image `name:version`; without a version the newest. Raises `NotFound` with what comes near."""
    everything = entries(additions)
    fitting = [entry for entry in everything if reference in (entry.name, entry.name.partition(":")[0])]
    for entry in fitting:
        if entry.arch == arch:
            return entry
    if fitting:
        arches = ", ".join(sorted({entry.arch for entry in fitting}))
        raise NotFound(f"'{reference}' is not published for {arch}", f"only for {arches}", "Choose one with --arch.")
    near = difflib.get_close_matches(reference, sorted({entry.name for entry in everything}), n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else "Give the whole address, https://…, of an image."
    raise NotFound(f"the catalogue has no image '{reference}'", next_step=hint)


def described(layout: Layout) -> list[tuple[str, str]]:
    """Each name with a line for people: what it is and for which machines."""
    lines: dict[str, str] = {}
    arches: dict[str, list[str]] = {}
    for entry in entries(layout.catalogue):
        lines.setdefault(entry.name, entry.description or public(entry.url))
        arches.setdefault(entry.name, []).append(entry.arch)
    return [(name, f"pull: {line} ({', '.join(dict.fromkeys(arches[name]))})") for name, line in lines.items()]


def _read(path: Path) -> Additions:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Additions()
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    try:
        return msgspec.yaml.decode(content, type=Additions)
    except msgspec.MsgspecError as error:
        raise InvalidInput(f"{path} can't be used", str(error), "Mend it, or move it away.") from error


def _with_bases(entry: Entry, bases: dict[str, str]) -> Entry:
    def full(address: str) -> str:
        head, brace, rest = address.removeprefix("{").partition("}")
        return bases[head] + rest if brace and address.startswith("{") and head in bases else address

    return msgspec.structs.replace(entry, url=full(entry.url), checksums=full(entry.checksums))


def _official() -> tuple[Entry, ...]:
    return (*_debian(), *_ubuntu(), *_fedora(), *_alpine(), *_rocky(), *_arch(), *_freebsd())


def _debian() -> list[Entry]:
    releases = {"13": "trixie", "12": "bookworm", "11": "bullseye"}
    return [
        Entry(
            name=f"debian:{version}",
            arch=arch,
            # "generic" has all drivers; "genericcloud" lacks those of emulated disks and network cards.
            url=f"{{debian}}/{codename}/latest/debian-{version}-generic-{debian_arch}.qcow2",
            checksums=f"{{debian}}/{codename}/latest/SHA512SUMS",
            firmwares=_firmwares(arch),
            description=f"Debian {version}, official cloud image",
        )
        for version, codename in releases.items()
        for arch, debian_arch in DEBIAN_ARCHES.items()
        if arch != "riscv64" or version == "13"
    ]


def _ubuntu() -> list[Entry]:
    return [
        Entry(
            name=f"ubuntu:{version}",
            arch=arch,
            url=f"{{ubuntu}}/{codename}/release/ubuntu-{version}-server-cloudimg-{debian_arch}.img",
            checksums=f"{{ubuntu}}/{codename}/release/SHA256SUMS",
            firmwares=_firmwares(arch),
            description=f"Ubuntu {version} LTS server, official cloud image",
        )
        for version, codename in (("24.04", "noble"), ("22.04", "jammy"))
        for arch, debian_arch in DEBIAN_ARCHES.items()
    ]


def _fedora() -> list[Entry]:
    return [
        Entry(
            name=f"fedora:{version}",
            arch=arch,
            url=f"{{fedora}}/{version}/Cloud/{arch}/images/Fedora-Cloud-Base-Generic-{version}-{compose}.{arch}.qcow2",
            checksums=f"{{fedora}}/{version}/Cloud/{arch}/images/Fedora-Cloud-{version}-{compose}-{arch}-CHECKSUM",
            firmwares=_firmwares(arch),
            description=f"Fedora Cloud {version}",
        )
        for version, compose in (("44", "1.7"), ("43", "1.6"), ("42", "1.1"))
        for arch in _TWO
    ]


def _alpine() -> list[Entry]:
    address = "{{alpine}}/v3.23/releases/cloud/nocloud_alpine-3.23.4-{arch}-{firmware}-cloudinit-r0.qcow2"
    return [
        Entry(
            name="alpine:3.23",
            arch=arch,
            url=address.format(arch=arch, firmware=firmware),
            checksums=address.format(arch=arch, firmware=firmware) + ".sha512",
            firmwares=(firmware,),
            description="Alpine Linux 3.23, official cloud image",
        )
        for arch, firmware in ((_TWO[0], BOTH[0]), (_TWO[1], BOTH[1]))
    ]


def _rocky() -> list[Entry]:
    address = "{{rocky}}/9/images/{arch}/Rocky-9-GenericCloud-Base.latest.{arch}.qcow2"
    return [
        Entry(
            name="rocky:9",
            arch=arch,
            url=address.format(arch=arch),
            checksums=address.format(arch=arch) + ".CHECKSUM",
            firmwares=_firmwares(arch),
            description="Rocky Linux 9, official cloud image",
        )
        for arch in _TWO
    ]


def _arch() -> list[Entry]:
    url = "{arch}/latest/Arch-Linux-x86_64-cloudimg.qcow2"
    return [
        Entry(
            name="arch:latest",
            arch="x86_64",
            url=url,
            checksums=f"{url}.SHA256",
            description="Arch Linux, the latest cloud image",
        )
    ]


def _freebsd() -> list[Entry]:
    folders: dict[Arch, tuple[str, str]] = {"x86_64": ("amd64", "amd64"), "aarch64": ("aarch64", "arm64-aarch64")}
    return [
        Entry(
            name=f"freebsd:{version}",
            arch=arch,
            url=f"{{freebsd}}/{version}-RELEASE/{folder}/Latest/"
            f"FreeBSD-{version}-RELEASE-{label}-BASIC-CLOUDINIT-ufs.qcow2.xz",
            checksums=f"{{freebsd}}/{version}-RELEASE/{folder}/Latest/CHECKSUM.SHA512",
            firmwares=_firmwares(arch),
            description=f"FreeBSD {version} with cloud-init",
        )
        for version in ("15.1", "14.4")
        for arch, (folder, label) in folders.items()
    ]


_TWO: tuple[Arch, Arch] = ("x86_64", "aarch64")


def _firmwares(arch: Arch) -> tuple[Firmware, ...]:
    return BOTH if arch == "x86_64" else UEFI

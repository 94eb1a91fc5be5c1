"""Images from outside, with QEMU's own tools on the other side: what comes in is what was there."""

import asyncio
import hashlib
import lzma
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.root import small_file_system
from tests.helpers.web import Site, serving

from atoll.errors import DownloadFailed, ImageRefused, InvalidInput, StorageFailed
from atoll.images import convert
from atoll.images.formats import inspect
from atoll.images.importer import import_file
from atoll.images.made import Made
from atoll.images.pull import pull
from atoll.images.source import opened
from atoll.layout import Layout
from atoll.model.operation import Progress
from atoll.model.requests import ImportRequest, PullRequest

pytestmark = pytest.mark.vm

MEMTEST = Path("/usr/lib/memtest86+/memtest86+x64.iso")
SIZE = 48 << 20
VARIANTS = [
    ("raw", ""),
    ("qcow2", ""),
    ("qcow2", "compat=0.10"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "extended_l2=on"),
    ("qcow2", "compression_type=zstd"),
    ("vmdk", ""),
    ("vmdk", "subformat=streamOptimized"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
]


def run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with a boot sector, data here and there, and holes."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    noise = random.Random(3)
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(bytes(510) + b"\x55\xaa")
        for offset in (1 << 20, (7 << 20) + 12345, SIZE - 4096):
            file.seek(offset)
            file.write(noise.randbytes(4096))
        file.seek(20 << 20)
        file.write(b"compressible " * 100_000)
    return path


def converted(raw: Path, target: Path, kind: str, options: str = "", *flags: str) -> Path:
    run("qemu-img", "convert", *flags, "-f", "raw", "-O", kind, *(["-o", options] if options else []), raw, target)
    return target


async def imported(path: Path, folder: Path, report: list[Progress] | None = None, **options: object) -> Made:
    folder.mkdir(exist_ok=True)
    seen: list[Progress] = [] if report is None else report
    request = ImportRequest(path=str(path), **options)  # type: ignore[arg-type]
    return await import_file(request, folder=folder, report=seen.append)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
async def test_the_disk_that_comes_in_is_the_disk_that_was(kind: str, options: str, raw: Path, tmp_path: Path) -> None:
    source = converted(raw, tmp_path / f"it's: a,b=c 💾 {options}.{kind}", kind, options)
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    seen: list[Progress] = []
    made = await imported(source, tmp_path / "made", seen)
    [(path, layer)] = made.layers
    assert run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path) == "Images are identical.\n"
    run("qemu-img", "check", "-q", "-f", "qcow2", path)
    assert (layer.virtual_size, made.image.disks[0].size, made.image.disks[0].layer) == (SIZE, SIZE, layer.id)
    assert (layer.file_size, layer.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert layer.file_size < 4 << 20  # holes stay holes
    assert made.image.sha256 == before
    with opened(path) as frozen:
        assert inspect(frozen).virtual_size == SIZE
    percents = [event.done for event in seen if event.step == "convert"]
    assert percents == sorted(percents)
    assert percents[-1] == 100


async def test_compressed_and_streamed_files_are_unpacked(raw: Path, tmp_path: Path) -> None:
    source = converted(raw, tmp_path / "disk.qcow2", "qcow2", "", "-c")
    made = await imported(source, tmp_path / "made")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, made.layers[0][0])


async def test_a_forged_header_in_a_raw_disk_is_only_data(raw: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"host's secret".ljust(1 << 20, b"!"))
    forged = tmp_path / "forged.raw"
    run("qemu-img", "create", "-f", "qcow2", "-b", secret, "-F", "raw", forged, "1M")
    with pytest.raises(ImageRefused, match="secret"):
        await imported(forged, tmp_path / "refused")
    made = await imported(forged, tmp_path / "made", format="raw")
    [(path, _)] = made.layers
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", forged, path)
    assert "backing" not in run("qemu-img", "info", "-f", "qcow2", path)


async def test_references_made_by_qemu_itself_are_refused(raw: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    run(
        "qemu-img",
        "create",
        "-f",
        "qcow2",
        "-o",
        f"data_file={data},data_file_raw=on",
        tmp_path / "outside.qcow2",
        "1M",
    )
    converted(raw, tmp_path / "flat.vmdk", "vmdk", "subformat=monolithicFlat")
    converted(raw, tmp_path / "split.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse")
    converted(raw, tmp_path / "base.vmdk", "vmdk")
    run("qemu-img", "create", "-f", "vmdk", "-b", tmp_path / "base.vmdk", "-F", "vmdk", tmp_path / "child.vmdk")
    for name in ("outside.qcow2", "flat.vmdk", "split.vmdk", "child.vmdk"):
        with pytest.raises(ImageRefused):
            await imported(tmp_path / name, tmp_path / "made")
    luks = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    run("qemu-img", "create", "-f", "qcow2", *luks, tmp_path / "luks.qcow2", "1M")
    with pytest.raises(ImageRefused, match="encrypted"):
        await imported(tmp_path / "luks.qcow2", tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize(("kind", "options"), [("qcow2", ""), ("vmdk", ""), ("vdi", ""), ("vhdx", "")])
async def test_a_file_whose_end_is_missing_is_refused(kind: str, options: str, raw: Path, tmp_path: Path) -> None:
    source = converted(raw, tmp_path / "disk", kind, options)
    # Data that isn't there would read as zeros: worse than an error.
    os.truncate(source, source.stat().st_size - (1 << 20))
    with pytest.raises(ImageRefused):
        await imported(source, tmp_path / "made")


async def test_a_small_file_that_unfolds_without_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "BASE_SIZE", 1 << 20)
    source = tmp_path / "bomb.qcow2"
    pattern = tmp_path / "pattern"
    pattern.write_bytes(b"\x55\xaa" * (64 << 20))
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", pattern, source)
    assert source.stat().st_size < 1 << 20
    with pytest.raises(ImageRefused, match="too much for a file of"):
        await imported(source, tmp_path / "made", format="qcow2")


async def test_reading_without_end_is_stopped(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "time_bound", lambda *_: 0.001)
    with pytest.raises(ImageRefused, match="to read"):
        await imported(raw, tmp_path / "made")


async def test_a_cancelled_import_leaves_no_qemu_img(raw: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.raw"
    with big.open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa")
        for _ in range(40):
            file.write(os.urandom(8 << 20))
    seen: list[Progress] = []
    task = asyncio.create_task(imported(big, tmp_path / "made", seen))
    async with asyncio.timeout(60):
        while not any(event.step == "convert" for event in seen):
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    words = os.fsencode(tmp_path / "made")
    left = [pid for pid in Path("/proc").glob("[0-9]*") if (pid / "cmdline").exists() and words in _command_line(pid)]
    assert not left


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


async def test_an_image_that_a_vm_uses_is_not_read(raw: Path, tmp_path: Path) -> None:
    source = converted(raw, tmp_path / "disk.qcow2", "qcow2")
    qemu = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert qemu.stdin and qemu.stdout
        qemu.stdin.write(b"read 0 512\n")
        qemu.stdin.flush()
        qemu.stdout.readline()
        with pytest.raises(ImageRefused, match="another program"):
            await imported(source, tmp_path / "made")
    finally:
        qemu.communicate(b"quit\n", timeout=20)


async def test_a_full_disk_is_told_and_can_be_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    with small_file_system(folder, size="4m"):
        source = tmp_path / "disk.raw"
        source.write_bytes(bytes(510) + b"\x55\xaa" + os.urandom(16 << 20))
        with pytest.raises(StorageFailed, match="No space left on device"):
            await imported(source, folder)
        with pytest.raises(StorageFailed, match="No space left on device"):
            await imported(MEMTEST, folder)


async def test_an_imported_cd_boots_and_says_who_it_is(tmp_path: Path) -> None:
    made = await imported(MEMTEST, tmp_path / "made", arch="x86_64")
    [(path, sha256)] = made.blobs
    assert made.image.disks[0].media == "cdrom"
    assert sha256 == hashlib.sha256(MEMTEST.read_bytes()).hexdigest()
    assert "Memtest86+" in await asyncio.to_thread(_screen_of, path, tmp_path)


def _screen_of(disc: Path, folder: Path) -> str:
    """Boot a CD until its serial line or its screen's text memory names Memtest86+."""
    address = folder / "monitor"
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-display", "none", "-nodefaults", "-vga", "std",
         "-cdrom", disc, "-monitor", f"unix:{address},server=on,wait=off"]
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        text = ""
        while "Memtest86+" not in text and time.monotonic() < deadline and qemu.poll() is None:
            time.sleep(1)
            text = _text_memory(address)
        return text
    finally:
        qemu.kill()
        qemu.wait()


def _text_memory(address: Path) -> str:
    """The characters of the VGA text screen, which are every second byte from 0xb8000 on."""
    with socket.socket(socket.AF_UNIX) as monitor:
        try:
            monitor.connect(str(address))
        except OSError:
            return ""
        monitor.settimeout(10)
        monitor.sendall(b"xp /4000xb 0xb8000\n")
        said = b""
        while said.count(b"(qemu)") < 2:
            said += monitor.recv(1 << 16)
    shown = [int(value, 16) for value in re.findall(rb"0x([0-9a-f]{2})\b", said.split(b"000b8000:", 1)[-1])]
    return "".join(map(chr, shown[::2]))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Site()) as found:
        yield found


def published(site: Site, layout: Layout, raw: Path, folder: Path) -> bytes:
    """Lay out the server as the publishers do, and tell the catalogue to go there."""
    disk = converted(raw, folder / "published.qcow2", "qcow2", "", "-c").read_bytes()
    sha256, sha512 = hashlib.sha256, hashlib.sha512
    debian, rocky = "debian-12-generic-amd64.qcow2", "Rocky-9-GenericCloud-Base.latest.x86_64.qcow2"
    freebsd = "FreeBSD-15.1-RELEASE-amd64-BASIC-CLOUDINIT-ufs.qcow2.xz"
    packed = lzma.compress(disk, preset=0)
    site.files = {
        f"/debian/bookworm/latest/{debian}": disk,
        "/debian/bookworm/latest/SHA512SUMS": f"{sha512(disk).hexdigest()}  {debian}\n".encode(),
        f"/rocky/9/images/x86_64/{rocky}": disk,
        f"/rocky/9/images/x86_64/{rocky}.CHECKSUM": f"SHA256 ({rocky}) = {sha256(disk).hexdigest()}\n".encode(),
        f"/freebsd/15.1-RELEASE/amd64/Latest/{freebsd}": packed,
        "/freebsd/15.1-RELEASE/amd64/Latest/CHECKSUM.SHA512": (
            f"SHA512 ({freebsd}) = {sha512(packed).hexdigest()}\n".encode()
        ),
    }
    layout.data.mkdir(parents=True, exist_ok=True)
    layout.catalogue.write_text(
        "publishers:\n" + "".join(f"  {name}: {site.url}/{name}\n" for name in ("debian", "rocky", "freebsd"))
    )
    return disk


@pytest.mark.parametrize("name", ["debian:12", "rocky", "freebsd:15.1"])
async def test_official_images_come_by_name(name: str, site: Site, layout: Layout, raw: Path, tmp_path: Path) -> None:
    disk = published(site, layout, raw, tmp_path)
    folder = tmp_path / "made"
    folder.mkdir()
    site.dies_after = [10**9, 100_000]  # the checksum file comes, the image breaks off once
    seen: list[Progress] = []
    made = await pull(PullRequest(source=name, arch="x86_64"), layout=layout, folder=folder, report=seen.append)
    [(path, _)] = made.layers
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path)
    assert made.image.name.startswith(name.partition(":")[0])
    assert (made.image.guest.seed, made.image.guest.agent) == ("nocloud", False)
    assert made.image.sha256 == hashlib.sha256(disk).hexdigest()
    assert made.image.source.startswith(site.url)
    assert {event.step for event in seen} >= {"download", "verify", "convert"}
    assert [file.name for file in folder.iterdir()] == [path.name]
    assert not list(layout.downloads.glob("*.part"))


async def test_an_address_needs_a_checksum_or_tls(site: Site, layout: Layout, raw: Path, tmp_path: Path) -> None:
    disk = published(site, layout, raw, tmp_path)
    site.files["/My%20Disk.qcow2"] = disk
    url = f"{site.url}/My%20Disk.qcow2?token=secret"
    folder = tmp_path / "made"
    folder.mkdir()
    with pytest.raises(InvalidInput, match="neither TLS nor a checksum"):
        await pull(PullRequest(source=url), layout=layout, folder=folder, report=lambda _: None)
    assert not site.asked
    right, wrong = f"sha256:{hashlib.sha256(disk).hexdigest()}", "sha256:" + "0" * 64
    with pytest.raises(DownloadFailed, match="wrong checksum") as failure:
        await pull(PullRequest(source=url, checksum=wrong), layout=layout, folder=folder, report=lambda _: None)
    assert "secret" not in failure.value.text
    made = await pull(PullRequest(source=url, checksum=right), layout=layout, folder=folder, report=lambda _: None)
    assert (made.image.name, made.image.source) == ("my-disk:latest", f"{site.url}/My%20Disk.qcow2")


async def test_a_dangerous_image_is_refused_though_its_checksum_is_right(
    site: Site, layout: Layout, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.qcow2"
    run("qemu-img", "create", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", evil, "1M")
    site.files["/evil"] = evil.read_bytes()
    checksum = f"sha256:{hashlib.sha256(evil.read_bytes()).hexdigest()}"
    request = PullRequest(source=f"{site.url}/evil", checksum=checksum)
    with pytest.raises(ImageRefused, match="/etc/shadow"):
        await pull(request, layout=layout, folder=tmp_path, report=lambda _: None)
    assert not list(layout.downloads.glob("*.part"))

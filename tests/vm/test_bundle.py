"""A machine as one file: taken to another home it goes on there, and a bundle that isn't whole is refused whole."""

import asyncio
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from tests.helpers.command import ATOLL, atoll
from tests.helpers.machines import Factory
from tests.helpers.root import small_file_system
from tests.helpers.world import disagreements

from atoll.errors import AlreadyExists, AtollError, ImageRefused, InvalidInput, NotFound, StorageFailed
from atoll.layout import Layout
from atoll.model.bundle import Manifest
from atoll.model.requests import CreateRequest, DiskRequest, ImportRequest
from atoll.model.state import Phase
from atoll.operations import bundle_format

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture
async def other(home: Path) -> AsyncIterator[Factory]:
    """A second home."""
    folder = home / "other"
    folder.mkdir()
    async with Factory(Layout(data=folder / "data", cache=home / "cache", run=folder / "run")) as machines:
        yield machines


async def check_nothing(other: Factory) -> None:
    assert await disagreements(other.layout) == []
    assert await other.host.ls() == []
    assert await other.host.operations.ls(unfinished=True) == []


async def test_a_guest_goes_on_in_another_home_with_its_memory(factory: Factory, other: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(DiskRequest(name="data", size="8MiB"),))
    await vm.sh("echo one > /root/file; printf first > /dev/vdb; sync; echo kept > /dev/shm/in-memory")
    boot = await vm.read("/proc/sys/kernel/random/boot_id")
    node = await vm.snapshot("clean", message="all is well")
    await vm.sh("echo two > /root/file; sync; rm /dev/shm/in-memory")
    bundle = factory.folder / "odd name \N{SNOWMAN}\n.atoll"
    await vm.export(bundle, snapshot="clean")
    assert bundle.stat().st_mode & 0o777 == 0o600
    await vm.rm(force=True)

    made = other.machine(await other.host.import_bundle(bundle))
    assert (made.name, await made.phase()) == ("v", Phase.STOPPED)
    assert made.id != vm.id
    assert made.record.spec.nics[0].mac != node.spec.nics[0].mac
    (there,) = [each.snapshot for each in await made.history()]
    assert (there.name, there.message, there.id == node.id) == ("clean", "all is well", False)
    await made.start(wait=True, timeout=120)
    assert (await made.read("/root/file"), await made.sh("head -c 5 /dev/vdb")) == ("one", "first")
    assert await made.sh("cat /dev/shm/in-memory || echo none") == "none"

    await made.restore("clean")
    assert await made.read("/dev/shm/in-memory") == "kept"
    assert await made.read("/proc/sys/kernel/random/boot_id") == boot
    [copy] = await other.host.fork("v@clean", 1, name="copy")
    copied = other.machine(await other.host.get(copy.name))
    assert (await copied.read("/dev/shm/in-memory"), await copied.sh("hostname")) == ("kept", "copy")

    layers = sorted((other.layout.layers).iterdir())
    with pytest.raises(AlreadyExists, match="there is a VM 'v' already"):
        await other.host.import_bundle(bundle)
    again = other.machine(await other.host.import_bundle(bundle, "again"))
    assert sorted((other.layout.layers).iterdir()) == layers
    await again.start(wait=True, timeout=120)
    assert await again.sh("hostname") == "again"
    for machine in (made, copied):
        await machine.rm(force=True)
    await again.restore("clean")
    assert await again.read("/dev/shm/in-memory") == "kept"
    assert await disagreements(other.layout) == []


async def test_a_running_vm_goes_as_it_is_now_through_a_pipe(factory: Factory, other: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo now > /root/file; sync")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb") as target:

        async def send() -> None:
            await vm.export(target)
            target.close()

        made, _ = await asyncio.gather(other.host.import_bundle(source, "w"), send())
    assert await vm.phase() is Phase.RUNNING
    assert await vm.history() == [] and [each.snapshot.memory for each in await made.history()] == [None]
    there = other.machine(await other.host.get("w"))
    await there.start(wait=True, timeout=120)
    assert (await there.read("/root/file"), await there.sh("hostname")) == ("now", "w")
    assert await disagreements(factory.layout) == []
    assert await disagreements(other.layout) == []


async def test_the_command_line_passes_bundles_on_and_tells_what_they_are(
    factory: Factory, other: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await factory.create("tiny", name="v", memory="96MiB")
    sent = await asyncio.to_thread(subprocess.run, [*ATOLL, "export", "v", "-"], capture_output=True, check=False)
    assert (sent.returncode, sent.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(sent.stdout)) as archive:
        assert archive.getnames()[0] == "atoll-bundle-1/manifest.json"
    path = factory.folder / "v.atoll"
    told = await asyncio.to_thread(atoll, "export", "v", str(path))
    assert (told.code, told.err) == (0, "")
    told = await asyncio.to_thread(atoll, "image", "import", str(path))
    assert told.code == 1 and "`atoll import FILE`" in told.err
    monkeypatch.setenv("ATOLL_HOME", str(other.folder))
    told = await asyncio.to_thread(atoll, "import", "-", "w", stdin=sent.stdout)
    assert (told.code, told.out, told.err) == (0, "w\n", "")
    told = await asyncio.to_thread(atoll, "import", str(factory.layout.database))
    assert told.code == 1 and "no bundle" in told.err and "`atoll image import FILE`" in told.err
    assert [info.vm.name for info in await other.host.ls()] == ["w"]
    assert await disagreements(other.layout) == []


async def test_what_the_base_has_is_left_out_and_has_to_be_there(factory: Factory, other: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.snapshot("monday", disk_only=True)
    await vm.sh("echo tuesday > /root/file; sync")
    await vm.snapshot("tuesday")
    of_image, monday, tuesday = (factory.folder / name for name in ("image", "monday", "tuesday"))
    await factory.host.export("v@monday", monday)
    await factory.host.export("v@monday", of_image, base="tiny")
    await factory.host.export("v@tuesday", tuesday, base="v@monday", disk_only=True)
    assert tuesday.stat().st_size < monday.stat().st_size / 2
    with pytest.raises(InvalidInput, match="is a VM"):
        await factory.host.export("v@tuesday", tuesday, base="v")
    with pytest.raises(NotFound):
        await factory.host.export("v@tuesday", tuesday, base="nothing")

    for bundle, base in ((tuesday, "v@monday"), (of_image, "tiny")):
        with pytest.raises(NotFound, match=f"stands on '{base}'"):
            await other.host.import_bundle(bundle)
    await check_nothing(other)
    await other.image("tiny")
    await (await other.host.import_bundle(of_image, "thin")).rm()
    await other.host.import_bundle(monday, "m")
    made = other.machine(await other.host.import_bundle(tuesday, "t"))
    await (await other.host.get("m")).rm()
    await made.start(wait=True, timeout=120)
    assert await made.read("/root/file") == "tuesday"
    assert await disagreements(other.layout) == []


async def test_the_variables_of_uefi_go_along(factory: Factory, other: Factory) -> None:
    vm = factory.machine(await factory.host.create(CreateRequest(name="v", firmware="uefi", disk_size="1MiB")))
    nvram = factory.layout.vm(vm.id).nvram
    nvram.write_bytes(b"mine" + nvram.read_bytes()[4:])
    await vm.snapshot("kept")
    nvram.write_bytes(b"then" + nvram.read_bytes()[4:])
    for name, snapshot, begins in (("past", "kept", b"mine"), ("present", None, b"then")):
        await vm.export(factory.folder / name, snapshot=snapshot)
        made = await other.host.import_bundle(factory.folder / name, name)
        assert other.layout.vm(made.id).nvram.read_bytes().startswith(begins)
    assert await disagreements(factory.layout) == []
    assert await disagreements(other.layout) == []


# What is wrong


async def small_bundle(factory: Factory) -> bytes:
    """Of a VM with two disks and a kernel's worth of other files, but small."""
    (factory.folder / "disk").write_bytes(os.urandom(100_000))
    await factory.host.images.import_file(
        ImportRequest(path=str(factory.folder / "disk"), name="small", format="raw", firmware="bios")
    )
    options = {"memory": "32MiB", "disks": (DiskRequest(name="data", size="1MiB"),)}
    vm = await factory.host.create("small", name="s", **options)
    await vm.start()
    await vm.snapshot("memory")
    path = factory.folder / "small.atoll"
    await vm.export(path, snapshot="memory")
    await vm.rm(force=True)
    return path.read_bytes()


async def test_a_bundle_that_is_altered_or_cut_anywhere_is_refused_and_leaves_nothing(
    factory: Factory, other: Factory
) -> None:
    whole = await small_bundle(factory)
    path = factory.folder / "wrong"
    size = len(whole)
    places = {*range(0, 512, 37), *range(512, 6000, 419), *range(6000, size, size // 40), size - 1, size - 1025}
    for place in sorted(places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        with pytest.raises((ImageRefused, NotFound)) as caught:
            await other.host.import_bundle(path)
        assert caught.value.why, place
    for length in (0, 1, 100, 512, 513, 3000, *range(10_000, size, size // 20), size - 1024, size - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageRefused):
            await other.host.import_bundle(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ImageRefused, match="follows its end"):
        await other.host.import_bundle(path)
    await check_nothing(other)
    path.write_bytes(whole)
    made = other.machine(await other.host.import_bundle(path))
    await made.restore("memory")
    assert await made.phase() is Phase.RUNNING
    assert await disagreements(other.layout) == []


def manifest_of(whole: bytes) -> tuple[dict[str, object], bytes]:
    """The manifest, and what follows its checksum."""
    size = int(whole[124:135], 8)
    after = 512 + size + len(bundle_format.padding(size))
    return msgspec.json.decode(whole[512 : 512 + size]), whole[after + 1024 :]


def with_manifest(manifest: object, rest: bytes) -> bytes:
    content = msgspec.json.encode(manifest)
    return bundle_format.plain_member(bundle_format.MANIFEST, content) + bundle_format.sums(content) + rest


# Someone with bad intentions takes care of checksums: path to what they write, and the value.
LIES: list[tuple[tuple[str | int, ...], object]] = [
    (("snapshot", "vm_name"), "../../x"),
    (("snapshot", "vm_name"), "\x1b[2J"),
    (("snapshot", "name"), "../x"),
    (("snapshot", "memory"), None),
    (("snapshot", "spec", "disks", 0, "name"), "../../../etc/cron.d/x"),
    (("snapshot", "spec", "disks", 0, "name"), "data"),
    (("snapshot", "spec", "disks", 0, "size"), 1 << 62),
    (("snapshot", "spec", "disks", 0, "size"), 512),
    (("snapshot", "spec", "disks", 0, "layer"), "../../../etc/passwd"),
    (("snapshot", "spec", "disks", 0, "layer"), None),
    (("snapshot", "spec", "disks", 0, "blob"), "../../../etc/passwd"),
    (("snapshot", "spec", "disks", 0, "head"), "0" * 32),
    (("snapshot", "spec", "machine_type"), "q35,kernel=/etc/passwd"),
    (("snapshot", "spec", "memory"), 1 << 60),
    (("snapshot", "spec", "boot", "kernel"), "/etc/passwd"),
    (("snapshot", "spec", "nics", 0, "mac"), "x"),
    (("snapshot", "spec", "unheard"), "of"),
    (("snapshot", "nvram"), "../../../etc/passwd"),
    (("layers", 0, "layer", "id"), "../../x"),
    (("layers", 0, "layer", "sha256"), ""),
    (("layers", 0, "layer", "parent"), "0" * 32),
    (("layers", 0, "layer", "virtual_size"), 512),
    (("layers", 0, "size"), 1 << 60),
    (("layers", 0, "size"), 1 << 49),
    (("layers", 0, "size"), -1),
    (("layers", 0, "included"), False),
    (("layers",), []),
    (("blobs",), [{"sha256": "../x", "size": 1}]),
    (("blobs",), [{"sha256": "0" * 64, "size": 1}]),
    (("memory", "size"), 1 << 62),
    (("memory", "size"), 4096),
    (("memory", "stored"), 16),
    (("memory",), None),
]


async def test_a_manifest_that_lies_is_refused_and_leaves_nothing(factory: Factory, other: Factory) -> None:
    whole = await small_bundle(factory)
    path = factory.folder / "wrong"
    for keys, value in LIES:
        manifest, rest = manifest_of(whole)
        place: object = manifest
        for key in keys[:-1]:
            place = place[key]  # type: ignore[index]
        place[keys[-1]] = value  # type: ignore[index]
        path.write_bytes(with_manifest(manifest, rest))
        with pytest.raises((ImageRefused, NotFound, StorageFailed)) as caught:
            await other.host.import_bundle(path)
        assert "\x1b" not in caught.value.text and len(caught.value.text) < 600, keys
        await check_nothing(other)
    manifest, rest = manifest_of(whole)
    assert with_manifest(msgspec.convert(manifest, Manifest), rest) == whole


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda whole: whole.replace(b"atoll-bundle-1/", b"atoll-bundle-2/"), "Use a newer Atoll"),
        (lambda whole: b"\x28\xb5\x2f\xfd" + whole, "zstd -dc"),
        (lambda whole: bytes(len(whole)), "no bundle"),
        (lambda whole: b"QFI\xfb" + bytes(600), "atoll image import"),
        (lambda whole: b"", "empty"),
    ],
)
async def test_what_is_something_else_is_told(
    change: Callable[[bytes], bytes], told: str, factory: Factory, other: Factory
) -> None:
    path = factory.folder / "wrong"
    path.write_bytes(change(bundle_format.plain_member(bundle_format.MANIFEST, b"{}") + bundle_format.end()))
    with pytest.raises(ImageRefused, match=told):
        await other.host.import_bundle(path)
    for missing in (factory.folder / "missing", factory.folder):
        with pytest.raises((NotFound, InvalidInput)):
            await other.host.import_bundle(missing)
    await check_nothing(other)


async def test_a_layer_that_refers_to_a_file_of_the_host_is_refused(factory: Factory, other: Factory) -> None:
    whole = await small_bundle(factory)
    manifest, _ = manifest_of(whole)
    layer = manifest["layers"][0]["layer"]  # type: ignore[index]
    evil = factory.folder / "evil.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", evil, "1M"], check=True
    )
    content = evil.read_bytes()
    layer |= {"sha256": bundle_format.hashlib.sha256(content).hexdigest(), "virtual_size": 1 << 20}
    manifest |= {"layers": [{"layer": layer, "size": len(content)}], "memory": None}
    manifest["snapshot"] |= {"memory": None}  # type: ignore[operator]
    disk = manifest["snapshot"]["spec"]["disks"][0] | {"layer": layer["id"], "size": 1 << 20}  # type: ignore[index]
    manifest["snapshot"]["spec"]["disks"] = [disk]  # type: ignore[index]
    name = f"{bundle_format.ROOT}layers/{layer['id']}.qcow2"
    path = factory.folder / "wrong"
    path.write_bytes(with_manifest(manifest, bundle_format.plain_member(name, content) + bundle_format.end()))
    with pytest.raises(ImageRefused, match="backing file"):
        await other.host.import_bundle(path)
    await check_nothing(other)


async def test_a_cancelled_export_or_import_leaves_nothing(factory: Factory, other: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    for _ in range(3):
        task = asyncio.ensure_future(vm.export(factory.folder / "bundle"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, AtollError)):
            await task
    assert not [path for path in factory.folder.iterdir() if "bundle" in path.name or "export" in path.name]
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb"):
        # Nobody ever writes into this pipe.
        task = asyncio.ensure_future(other.host.import_bundle(source))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, AtollError)):
            await task
    assert await disagreements(factory.layout) == []
    await check_nothing(other)


@pytest.fixture
def mounted(home: Path) -> Iterator[Path]:
    """A folder on a small file system of its own."""
    folder = home / "small"
    folder.mkdir()
    with small_file_system(folder, size="100m"):
        yield folder


async def test_a_full_disk_refuses_an_import_before_and_on_the_way_and_an_export(
    factory: Factory, mounted: Path
) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.snapshot("clean")
    bundle = factory.folder / "bundle"
    await vm.export(bundle, snapshot="clean")
    size = bundle.stat().st_size
    for room in (size // 2, size // 4, size + (1 << 20)):
        async with Factory(Layout(data=mounted / "data", cache=factory.folder, run=mounted / "run")) as small:
            filler = mounted / "filler"
            free = os.statvfs(mounted)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))
            with pytest.raises(StorageFailed) as caught:
                await small.host.import_bundle(bundle)
            filler.unlink()
            assert "Free some space" in caught.value.next_step
            await check_nothing(small)
    with (mounted / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, os.statvfs(mounted).f_bavail * 4096 - (1 << 20)))
    with pytest.raises(StorageFailed):
        await vm.export(mounted / "bundle", snapshot="clean")
    assert not [path.name for path in mounted.iterdir() if path.name.startswith((".", "bundle"))]
    assert await disagreements(factory.layout) == []
    assert sys.platform == "linux"

"""Folders of the computer in real guests: what both sides see, through snapshots and forks; what a guest can't do."""

import asyncio
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers import leftovers
from tests.helpers.machines import Factory, Machine
from tests.helpers.root import only_root

from atoll.errors import AlreadyExists, AtollError, InvalidInput, NotFound, Unsupported
from atoll.host import facts
from atoll.model.requests import SetRequest, ShareRequest
from atoll.model.vm import ShareState
from atoll.operations import shares
from atoll.operations.shares import MOST

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

USER, NOBODY = 54321, 65534


@pytest.fixture
def folder(home: Path) -> Path:
    found = Path(os.path.realpath(home)) / "shared"
    found.mkdir()
    found.chmod(0o755)
    return found


def shared(folder: Path, at: str = "/mnt/data", *, read_only: bool = False) -> ShareRequest:
    return ShareRequest(host_path=str(folder), guest_path=at, read_only=read_only)


async def states(vm: Machine) -> list[ShareState]:
    return [share.state for share in await vm.shares()]


def server(vm: Machine, number: int = 0) -> facts.ProcessIdentity:
    share = vm.record.spec.shares[number]
    found = shares.server_of(vm._services.layout.vm(vm.id), share)
    assert found is not None
    return found.process


async def until_ended(process: facts.ProcessIdentity) -> None:
    async with asyncio.timeout(10):
        while facts.is_alive(process):
            await asyncio.sleep(0.01)


async def test_both_sides_see_what_the_other_writes(factory: Factory, folder: Path) -> None:
    (folder / "from here").write_text("hello")
    odd = ["blank in it", "ünïcödé", "'quotes\"", "-dash", "$dollar*", "back\\slash", "tab\tin it", "new\nline"]
    vm = await factory.run("tiny", name="v", memory="128MiB", shares=(shared(folder),))
    assert await states(vm) == ["shared"]
    assert await vm.read("'/mnt/data/from here'") == "hello"
    for name in odd:
        await vm.write(f"/mnt/data/{name}", name)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {n: n for n in odd} | {"from here": "hello"}
    # Many small ones, a large one with its hash, and what else a file system does.
    await vm.sh("mkdir /mnt/data/many; i=0; while [ $((i += 1)) -le 500 ]; do echo $i >/mnt/data/many/$i; done")
    assert sorted(int(path.read_text()) for path in (folder / "many").iterdir()) == list(range(1, 501))
    await vm.sh("dd if=/dev/urandom of=/mnt/data/large bs=1M count=100")
    told = (await vm.sh("sha256sum /mnt/data/large")).split()[0]
    assert hashlib.file_digest((folder / "large").open("rb"), "sha256").hexdigest() == told
    await vm.sh("cd /mnt/data && mv many less && ln -s less link && ln large hard && chmod 750 less && : >large")
    assert (folder / "link").readlink() == Path("less")
    assert stat.S_IMODE((folder / "less").stat().st_mode) == 0o750
    assert (folder / "hard").stat().st_size == 0
    (folder / "late").write_text("1")
    assert await vm.read("/mnt/data/late") == "1"
    (folder / "late").write_text("22")
    await asyncio.sleep(1.1)
    assert await vm.read("/mnt/data/late") == "22"
    # The guest's root is nobody special here.
    assert (await vm.exec(["chmod", "4755", "/mnt/data/late"])).exit_code != 0
    assert (await vm.exec(["mknod", "/mnt/data/null", "c", "1", "3"])).exit_code != 0
    assert (folder / "hard").stat().st_uid == os.geteuid()


async def test_folders_come_and_go_while_it_runs(factory: Factory, folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="128MiB")
    place = folder / "colon: and 'blank'"
    place.mkdir()
    (place / "x").write_text("kept")
    made = await vm.share_add(shared(place, "/mnt/a folder/", read_only=True))
    assert (made.guest_path, made.state) == ("/mnt/a folder", "shared")
    assert await vm.read("'/mnt/a folder/x'") == "kept"
    for attempt in ("echo no >'/mnt/a folder/x'", "rm '/mnt/a folder/x'", "touch '/mnt/a folder/new'"):
        assert (await vm.exec(["sh", "-c", attempt])).exit_code != 0
    await vm.share_add(shared(folder, "/mnt/b"))
    await vm.write("/mnt/b/y", "y")
    with pytest.raises(AlreadyExists, match="/mnt/b"):
        await vm.share_add(shared(place, "/mnt/b"))
    ended = server(vm)
    assert (await vm.share_rm("/mnt/a folder")).why == ""
    await until_ended(ended)
    assert await vm.sh("grep -c ^atoll /proc/mounts") == "1"
    await vm.sh("exec 3>/mnt/b/open; sleep 1000 >&3 2>&1 </dev/null &")
    assert "open there" in (await vm.share_rm("/mnt/b")).why
    with pytest.raises(NotFound, match="/mnt/b"):
        await vm.share_rm("/mnt/b")
    assert await vm.sh("grep ^atoll /proc/mounts; ls /dev/virtio-ports | grep -c share; true") == "0"
    # It's shared again, and again after a reboot of the guest's own, and after a stop.
    await vm.share_add(shared(folder, "/mnt/b"))
    assert await vm.read("/mnt/b/y") == "y"
    await vm.exec(["reboot"])
    await vm.reported("RESET")
    assert await states(vm) == ["not-mounted"]
    await vm.wait("ready", timeout=120)
    assert await vm.read("/mnt/b/y") == "y"
    await vm.stop(force=True)
    assert await states(vm) == ["stopped"]
    await vm.share_add(shared(place, "/mnt/c", read_only=True))
    await vm.start()
    assert await states(vm) == ["shared", "shared"]
    assert await vm.read("/mnt/c/x") == "kept"


@pytest.mark.slow
async def test_what_goes_on_from_memory_has_its_folders(factory: Factory, folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="128MiB")
    await vm.snapshot("before")
    await vm.share_add(shared(folder))
    await vm.sh("exec 3>/mnt/data/open; sleep 1000 >&3 2>&1 </dev/null &")
    await vm.snapshot("with")
    assert await vm.sh("echo 1 >/mnt/data/1; cat /mnt/data/1") == "1"
    await vm.restore("with")
    assert await states(vm) == ["shared"]
    assert await vm.sh("echo 2 >/mnt/data/2; ls /mnt/data; grep -c ^atoll /proc/mounts") == "1\n2\nopen\n1"
    await vm.restore("before")
    assert await states(vm) == ["shared"]
    assert await vm.sh("ls /mnt/data") == "1\n2\nopen"
    await vm.suspend()
    assert await states(vm) == ["stopped"]
    await vm.resume()
    assert await vm.sh("ls /mnt/data") == "1\n2\nopen"
    copies = [factory.machine(copy) for copy in await vm.fork(2)]
    for number, copy in enumerate(copies):
        assert await states(copy) == ["shared"]
        await copy.write(f"/mnt/data/of-{number}", "x")
    assert len({server(each).pid for each in (vm, *copies)}) == 3
    assert {path.name for path in folder.iterdir()} == {"1", "2", "open", "of-0", "of-1"}
    clone = factory.machine(await vm.clone("c"))
    await clone.start()
    assert await clone.read("/mnt/data/1") == "1"
    # What was taken back stays so, though the snapshot's memory has it mounted.
    await vm.share_rm("/mnt/data")
    await vm.restore("with")
    assert await vm.shares() == []
    assert await vm.sh("grep ^atoll /proc/mounts; ls /mnt/data") == ""
    assert (await vm.share_add(shared(folder))).state == "shared"
    await vm.restart(force=True)
    assert len(vm.record.spec.shares) == 1


async def test_a_bundle_leaves_its_folders_behind(factory: Factory, folder: Path, home: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="128MiB", shares=(shared(folder),))
    await vm.snapshot("live")
    await vm.export(home / "bundle", snapshot="live")
    came = factory.machine(await factory.host.import_bundle(home / "bundle", "w"))
    assert await came.shares() == []
    await came.restore("live")
    assert await came.sh("grep ^atoll /proc/mounts; ls /mnt/data") == ""
    assert (await came.share_add(shared(folder))).state == "shared"


async def test_a_server_that_ends_is_told_and_mended(factory: Factory, folder: Path) -> None:
    (folder / "x").write_text("x")
    vm = await factory.run("tiny", name="v", memory="128MiB", shares=(shared(folder),))
    os.kill(server(vm).pid, signal.SIGKILL)
    await until_ended(server(vm))
    assert await states(vm) == ["ended"]
    assert (await vm.share_add(shared(folder))).state == "shared"
    assert await vm.read("/mnt/data/x") == "x"
    # Whatever ends the QEMU ends it too.
    process = server(vm)
    os.kill(vm.pid, signal.SIGKILL)
    await until_ended(process)
    await vm.start()
    assert await vm.read("/mnt/data/x") == "x"
    await vm.stop(force=True)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(InvalidInput, match="there is no such folder"):
        await vm.start()
    assert await states(vm) == ["not-mounted"]
    folder.symlink_to("/etc")
    with pytest.raises(InvalidInput, match="a symbolic link leads to /etc now"):
        await vm.restart(force=True)


async def test_what_cannot_be_shared_is_said_and_changes_nothing(factory: Factory, folder: Path) -> None:
    vm = await factory.create("tiny", name="v", memory="128MiB")
    (folder / "file").write_text("")
    for host, guest, why in (
        (folder / "file", "/mnt/x", "it is a file"),
        (folder / "gone", "/mnt/x", "no such folder"),
        (folder, "mnt", "absolute"),
        (folder, "/", "absolute"),
        (folder, "/mnt/../etc", "absolute"),
        (folder, "/mnt/new\nline", "control characters"),
    ):
        with pytest.raises(InvalidInput, match=why):
            await vm.share_add(shared(Path(host), guest))
    for number in range(MOST):
        await vm.share_add(shared(folder, f"/mnt/{number}"))
    with pytest.raises(InvalidInput, match=f"ports for {MOST}"):
        await vm.share_add(shared(folder, "/mnt/more"))
    await vm.start()
    assert await states(vm) == ["shared"] * MOST
    with pytest.raises(AtollError):
        await factory.create("tiny", name="w", shares=(shared(folder), shared(folder)))
    await vm.set(SetRequest(agent=False))
    with pytest.raises(Unsupported, match="agent"):
        await vm.share_add(shared(folder, "/mnt/late"))


@pytest.fixture
def places() -> Iterator[list[Path]]:
    found: list[Path] = []
    yield found
    for place in found:
        leftovers.end_processes_of(place)
        subprocess.run(["rm", "-rf", place], check=True)


@only_root("it becomes other users")
@pytest.mark.parametrize("access", ["rw", "ro"])
@pytest.mark.parametrize("who", ["root", "user", "user without namespaces"])
def test_a_guest_that_speaks_for_itself_stays_in_the_folder(who: str, access: str, places: list[Path]) -> None:
    # Without a root of its own the server asks the computer who it is.
    owner = {"root": 0, "user": USER, "user without namespaces": NOBODY}[who]
    place = Path("/tmp") / f"atoll-test-shared-{os.getpid()}"
    place.mkdir()
    places.append(place)
    (place / "inside").write_text("in")
    os.mknod(place / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    for path in (place, place / "inside"):
        os.chown(path, owner, owner)
    become = [] if owner == 0 else ["setpriv", f"--reuid={owner}", f"--regid={owner}", "--clear-groups"]
    words = [sys.executable, "-m", "tests.helpers.sftp_attacks", str(place), access]
    words += ["without-namespaces"] if "without" in who else []
    done = subprocess.run([*become, *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {found.pop("Uid"), found.pop("NoNewPrivs"), found.pop("Seccomp")} == {str(owner), "1", "2"}
    assert int(found.pop("CapEff"), 16) == 0
    assert (int(found.pop("CapBnd"), 16) == 0) is ("without" not in who)
    accounts, device = found.pop("accounts"), found.pop("a device")
    if "without" not in who:
        assert accounts == "share:x:0:0::/:/\n", "an ordinary user is called 0 in there"
        assert device == "Permission denied"
    done_well = {name for name, refusal in found.items() if refusal in ("", "in")}
    assert done_well == {"read inside", *(["write inside", "an honest mode"] if access == "rw" else [])}
    assert stat.S_IMODE((place / "inside").stat().st_mode) & 0o7000 == 0

"""A machine with a past, and all that copies it, carries it away or merges its layers; for tests of what fails then."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from atoll.model.state import Phase
from atoll.operations import merge as merging
from atoll.operations.merge import merge
from atoll.platform.local import LocalHost
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements


async def content(vm: Machine) -> str:
    """The checksums of the guest's files, as its disk has them."""
    return await vm.sh("echo 3 > /proc/sys/vm/drop_caches; cd /root; sha256sum data-*")


async def new_data(vm: Machine, name: str) -> None:
    await vm.sh(f"dd if=/dev/urandom of=/root/data-{name} bs=1M count=6 2>/dev/null; sync")


@dataclass
class Kept:
    """A VM `v` that runs, with the snapshot `first` and data that came after it."""

    factory: Factory
    vm: Machine
    first: str
    now: str

    @property
    def host(self) -> LocalHost:
        return self.factory.host

    @property
    def folder(self) -> Path:
        return self.factory.folder

    async def copy(self) -> Machine | None:
        found = [info for info in await self.host.ls() if info.vm.name == "copy"]
        return self.factory.machine(await self.host.get("copy")) if found else None

    async def is_whole(self) -> None:
        """The guest goes on, or was killed and can be started again; its data are there."""
        assert await self.vm.phase() in (Phase.RUNNING, Phase.STOPPED)
        if await self.vm.phase() is Phase.STOPPED:
            await self.vm.start(wait=True, timeout=120)
        assert await content(self.vm) == self.now
        assert [node.snapshot.name for node in await self.vm.history()] == ["first"]

    async def drop_copy(self, *, of: str) -> bool:
        """If there is a copy it has the data of that instant; it is removed. Whether there was one."""
        copy = await self.copy()
        if copy is None:
            return False
        if await copy.phase() is not Phase.RUNNING:
            await copy.start(wait=True, timeout=120)
        assert await content(copy) == of
        await copy.rm(force=True)
        return True


async def kept(factory: Factory) -> Kept:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await new_data(vm, "1")
    first = await content(vm)
    await vm.snapshot("first")
    await new_data(vm, "2")
    return Kept(factory, vm, first, await content(vm))


async def nothing_is_left(factory: Factory) -> None:
    """No operation is unfinished, what is recorded is what is there, and `fsck` finds nothing."""
    async with LocalHost(factory.layout) as host:
        assert await host.operations.ls(unfinished=True) == []
        assert await disagreements(factory.layout) == []
        assert await host.fsck() == []
    assert not list(factory.layout.temporary.glob("*"))


async def grown(at: Kept) -> None:
    """The chain is too long, and each of its layers has something that is seen."""
    for number in range(3):
        await new_data(at.vm, str(number))
        await at.vm.snapshot("layer", disk_only=True)
        await at.vm.forget("layer")
    at.now = await content(at.vm)


async def too_long(at: Kept) -> None:
    """Unless it is so already."""
    if not merging._next(at.host._services, at.vm.id):
        await grown(at)


@dataclass
class Act:
    """Something that writes, and what has come of it."""

    do: Callable[[Kept], Awaitable[object]]
    verbs: tuple[str, ...] = ()
    prepare: Callable[[Kept], Awaitable[object]] = field(default=lambda at: _nothing())
    copies: bool = False
    """Whether it writes so much that the disk may become full on the way, too."""
    of_first: bool = False


async def _nothing() -> None:
    return


async def one_waits(at: Kept) -> None:
    await at.host.pools.fill("v@first", 1)


async def backed_up(at: Kept) -> None:
    """A machine of which nothing is here any more."""
    if not (at.folder / "backups").exists():
        gone = await at.vm.clone("gone", full=True)
        await gone.backup(at.folder / "backups")
        await gone.rm()


async def exported(at: Kept) -> None:
    await at.vm.export(at.folder / "bundle", snapshot="first")


ACTS = {
    "fork": Act(lambda at: at.vm.fork(name="copy"), ("snapshot", "create", "start")),
    "take": Act(lambda at: at.host.pools.take("v@first", "copy"), ("take",), one_waits, of_first=True),
    "clone": Act(lambda at: at.vm.clone("copy"), ("cut", "create")),
    "clone in full": Act(lambda at: at.vm.clone("copy", full=True), ("create",), copies=True),
    "backup": Act(lambda at: at.vm.backup(at.folder / "backups"), ("backup", "cut"), copies=True),
    "restore backup": Act(
        lambda at: at.host.backups.restore(at.folder / "backups", "gone", "copy"),
        ("restore backup",),
        backed_up,
        copies=True,
    ),
    "export": Act(lambda at: at.vm.export(at.folder / "bundle"), ("cut", "export"), copies=True),
    "import": Act(
        lambda at: at.host.import_bundle(at.folder / "bundle", "copy"),
        ("import",),
        exported,
        copies=True,
        of_first=True,
    ),
    "image create": Act(lambda at: at.host.images.create("v", "made"), ("cut",)),
    "diff": Act(lambda at: at.host.diff("v@first", "v")),
    "merge": Act(lambda at: merge(services=at.host._services), ("merge",), too_long, copies=True),
}


async def check_made(name: str, at: Kept) -> None:
    """What was told to be done is there, and whole; then it goes."""
    act = ACTS[name]
    made = await at.drop_copy(of=at.first if act.of_first else at.now)
    if name in ("fork", "take", "clone", "clone in full", "restore backup", "import"):
        assert made
    elif name == "backup":
        assert (await at.host.backups.verify(at.folder / "backups")).damages == ()
        await at.host.backups.restore(at.folder / "backups", "v", "copy")
        assert await at.drop_copy(of=at.now)
    elif name == "export":
        await at.host.import_bundle(at.folder / "bundle", "copy")
        assert await at.drop_copy(of=at.now)
    elif name == "image create":
        await at.host.create("made", name="copy")
        assert await at.drop_copy(of=at.now)


async def cleared(at: Kept) -> None:
    """Nothing is left of an act, but for what it needed."""
    for pool in await at.host.pools.ls():
        await at.host.pools.rm(pool.snapshot_id)
    for image in await at.host.images.ls():
        if image.name == "made:latest":
            await at.host.images.rm("made", force=True)
    (at.folder / "bundle").unlink(missing_ok=True)

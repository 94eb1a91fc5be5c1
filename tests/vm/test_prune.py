"""`prune` frees exactly what it says, and takes nothing that somebody needs."""

import asyncio
import json
from pathlib import Path

import pytest
from tests.helpers.command import atoll
from tests.helpers.machines import Factory
from tests.helpers.world import disagreements

from atoll.host.files import locked
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.operation import Operation
from atoll.operations.journal import this_process

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def used(layout: Layout) -> int:
    """Bytes on the disk of all that may be pruned."""
    folders = (layout.layers, layout.blobs, layout.memory, layout.temporary, layout.templates, layout.downloads)
    everything = [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    return sum(path.stat().st_blocks * 512 for path in everything if path.is_file())


def litter(layout: Layout) -> list[Path]:
    """Files that nothing needs, one of each kind."""
    folder = layout.temporary / f"image-{new_id()}"
    folder.mkdir(parents=True)
    layout.memory.mkdir(exist_ok=True)
    paths = [
        layout.layers / f"{new_id()}.qcow2",
        layout.blobs / ("a" * 64),
        layout.memory / new_id(),
        folder / "root.tar",
        layout.temporary / "loose",
    ]
    for number, path in enumerate(paths, start=1):
        path.write_bytes(b"x" * 10_000 * number)
    return paths


def download(layout: Layout, content: bytes, *, total: int) -> Path:
    layout.downloads.mkdir(parents=True, exist_ok=True)
    part = layout.downloads / f"{new_id()}.part"
    part.write_bytes(content)
    part.with_suffix(".json").write_text(json.dumps({"etag": '"x"', "modified": "", "total": total}))
    return part


async def test_it_frees_exactly_what_the_dry_run_said(factory: Factory) -> None:
    layout = factory.layout
    vm = await factory.create("tiny", name="v", memory="96MiB")
    await vm.snapshot("first")
    stray = litter(layout)
    before = used(layout)
    promised = await factory.host.prune(dry_run=True)
    assert used(layout) == before and all(path.exists() for path in stray)
    assert {name.partition(" ")[0] for name, _ in promised} == {"layer", "blob", "memory", "unfinished"}
    assert await factory.host.prune() == promised
    assert before - used(layout) == sum(size for _, size in promised) > 0
    assert not any(path.exists() for path in stray)
    assert await factory.host.prune() == []
    assert [image.name for image in await factory.host.images.ls()] == ["tiny:latest"]
    assert await disagreements(layout) == []
    await vm.start(wait=True, timeout=120)


async def test_images_and_downloads_go_on_demand(factory: Factory) -> None:
    layout = factory.layout
    vm = await factory.create("tiny", name="v", memory="96MiB")
    await vm.snapshot("first")
    whole, partial, taken = (download(layout, b"x" * 9000, total=total) for total in (9000, 9001, 9000))
    assert await factory.host.prune() == []
    with locked(taken.with_suffix(".lock")):
        before = used(layout)
        promised = await factory.host.prune(every=True, dry_run=True)
        assert [name for name, _ in promised] == [f"download {whole.stem[:12]}"], "the VM came from the image"
        assert await factory.host.prune(every=True) == promised
        assert before - used(layout) == promised[0][1] > 0
    assert partial.exists() and taken.exists() and not whole.exists()
    await vm.rm()
    before = used(layout)
    promised = await factory.host.prune(every=True, dry_run=True)
    assert ("image tiny:latest", 0) in promised
    assert await factory.host.prune(every=True) == promised
    assert before - used(layout) == sum(size for _, size in promised)
    assert await factory.host.images.ls() == []
    assert not any(layout.layers.iterdir()) and not any(layout.blobs.iterdir())
    assert await factory.host.fsck() == []


async def test_templates_are_made_again(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo kept > /root/file")
    await vm.snapshot("first")
    (copy,) = await factory.host.fork("v@first")
    # A page that its guest reads for the first time takes room in the file.
    await copy.pause()
    before = used(factory.layout)
    promised = await factory.host.prune(dry_run=True)
    assert {name.partition(" ")[0] for name, _ in promised} == {"template"}
    assert await factory.host.prune() == promised
    assert before - used(factory.layout) == sum(size for _, size in promised) > 0
    assert not factory.layout.templates.exists()
    await copy.resume()
    live = await factory.host.get(copy.id)
    assert await factory.machine(live).read("/root/file") == "kept"
    (another,) = await factory.host.fork("v@first", name="another")
    assert await factory.machine(await factory.host.get(another.id)).read("/root/file") == "kept"


async def test_what_is_being_made_is_left_alone(factory: Factory) -> None:
    """Forks while others forget theirs: the memory of each is nobody's until it is recorded."""
    first, second = [await factory.run("tiny", name=name, memory="96MiB") for name in ("a", "b")]
    layout = factory.layout
    operation = Operation(
        id=new_id(), verb="snapshot", subject=first.id, subject_name="a", request={"id": new_id()}, state="running",
        owner=this_process(), created_at=0,
    )  # fmt: skip
    factory.host._services.records.put_operation(operation)
    layout.templates.mkdir(exist_ok=True)
    layout.temporary.mkdir(exist_ok=True)
    number = operation.request["id"]
    paths = [layout.templates / f"memory-{number}", layout.temporary / f"memory-{number}"]
    for path in paths:
        path.write_bytes(b"x")
    assert await factory.host.prune() == []
    assert all(path.exists() for path in paths)
    factory.host._services.records.put_operation(
        Operation(**{name: getattr(operation, name) for name in operation.__struct_fields__} | {"state": "done"})
    )
    for path in paths:
        path.unlink()

    async def prunes() -> None:
        for _ in range(20):
            await factory.host.prune()
            await asyncio.sleep(0.05)

    pruning = asyncio.create_task(prunes())
    forks = await asyncio.gather(first.fork(2), second.fork(2))
    await pruning
    assert sum(map(len, forks)) == 4
    assert await disagreements(layout) == []


async def test_the_command_line(factory: Factory) -> None:
    await factory.image("tiny")
    stray = litter(factory.layout)
    promised = await asyncio.to_thread(atoll, "prune", "--dry-run")
    assert promised.code == 0 and promised.out.splitlines()[-1].startswith("Would free ")
    listed = json.loads((await asyncio.to_thread(atoll, "prune", "-n", "--format", "json")).out)
    assert len(listed) == 5 and all(each["bytes"] > 0 for each in listed)
    done = await asyncio.to_thread(atoll, "prune")
    assert done.out.splitlines()[:-1] == promised.out.splitlines()[:-1]
    assert done.out.splitlines()[-1] == promised.out.splitlines()[-1].replace("Would free", "Freed")
    assert not any(path.exists() for path in stray)
    assert (await asyncio.to_thread(atoll, "prune")).out == "Freed 0B.\n"
    assert "image tiny:latest" in (await asyncio.to_thread(atoll, "prune", "--all")).out

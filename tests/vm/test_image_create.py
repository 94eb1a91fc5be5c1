"""Images made of machines: on the same layers, and whoever is made from one is a machine of its own."""

import pytest
from tests.helpers.machines import Factory
from tests.helpers.world import disagreements

from atoll.errors import InvalidInput, NotFound, WrongState
from atoll.model.requests import CreateRequest, DiskRequest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

MACHINE_ID = "0123456789abcdef0123456789abcdef"


async def test_an_image_of_a_snapshot_and_one_of_a_running_vm_boot_as_machines_of_their_own(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(DiskRequest(name="data", size="8MiB"),))
    await vm.sh(f"echo clean > /root/file; printf first > /dev/vdb; echo {MACHINE_ID} > /etc/machine-id; sync")
    await vm.snapshot("clean", message="all set up")
    await vm.sh("echo later > /root/file; printf later > /dev/vdb; sync")
    images = factory.host.images
    of_past, of_present = await images.create("v@clean", "web:v1"), await images.create("v", "web")
    assert (of_past.source, of_past.description, of_present.name) == ("v@clean", "all set up", "web:latest")
    assert not set(of_past.layer_ids) & set(of_present.layer_ids)
    before = len(list(factory.layout.layers.iterdir()))
    with pytest.raises(WrongState, match="in use"):
        await images.rm("web")
    await vm.rm(force=True)
    await images.prune()
    assert len(list(factory.layout.layers.iterdir())) == before, "both need all of theirs"

    past = factory.machine(await factory.host.create("web:v1", name="past"))
    present = factory.machine(await factory.host.create("web", name="present", memory="128MiB"))
    assert past.record.spec.memory == 96 << 20
    await images.rm("web:v1", force=True)
    await images.rm("web", force=True)
    for machine, file, data in ((past, "clean", "first"), (present, "later", "later")):
        await machine.start(wait=True, timeout=120)
        assert (await machine.read("/root/file"), await machine.sh("head -c 5 /dev/vdb")) == (file, data)
        assert await machine.sh("hostname") == machine.name
        assert await machine.read("/etc/machine-id") != MACHINE_ID
        await machine.rm(force=True)
    assert await disagreements(factory.layout) == []


async def test_an_image_is_in_use_by_what_stands_far_above_it(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    await vm.snapshot("s")
    with pytest.raises(WrongState, match="in use: by v"):
        await factory.host.images.rm("tiny")
    assert await factory.host.images.prune(every=True) == []
    await factory.host.images.rm("tiny", force=True)
    await vm.start(wait=True, timeout=120)
    await vm.rm(force=True)
    assert list(factory.layout.layers.iterdir()) == list(factory.layout.blobs.iterdir()) == []


async def test_wrong_sources_and_names_make_nothing(factory: Factory) -> None:
    await factory.create("tiny", name="v", memory="96MiB")
    before = await factory.host.images.ls()
    with pytest.raises(NotFound):
        await factory.host.images.create("v@none", "x")
    with pytest.raises(NotFound):
        await factory.host.images.create("w", "x")
    with pytest.raises(InvalidInput):
        await factory.host.images.create("v", "../X")
    assert await factory.host.images.ls() == before
    assert await disagreements(factory.layout) == []


async def test_the_variables_of_uefi_go_with_the_image(factory: Factory) -> None:
    vm = factory.machine(await factory.host.create(CreateRequest(name="v", firmware="uefi", disk_size="1MiB")))
    variables = factory.layout.vm(vm.id).nvram
    variables.write_bytes(b"mine" + variables.read_bytes()[4:])
    image = await factory.host.images.create("v", "firm")
    await vm.rm()
    made = factory.machine(await factory.host.create("firm", name="w"))
    assert factory.layout.vm(made.id).nvram.read_bytes().startswith(b"mine")
    assert await disagreements(factory.layout) == []
    await made.rm()
    await factory.host.images.rm(image.id[:12])
    assert list(factory.layout.blobs.iterdir()) == []

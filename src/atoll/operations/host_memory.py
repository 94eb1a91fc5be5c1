"""What the computer's memory is promised to, and what became of the promises."""

import contextlib

from atoll.errors import StorageFailed
from atoll.host import facts, page_merging
from atoll.model.vm import HostMemory
from atoll.operations.services import Services


def host_memory(services: Services) -> HostMemory:
    """A reading of now."""
    computer = facts.memory()
    vms = services.records.vms()
    running = [vm for vm in vms if vm.run is not None and facts.is_alive(vm.run)]
    shares, in_merged = [], 0
    for vm in running:
        assert vm.run is not None
        with contextlib.suppress(StorageFailed):  # It ended just now.
            shares.append(facts.memory_share(vm.run.pid))
            in_merged += page_merging.merged_of(vm.run.pid)
    used = sum(each.proportional for each in shares)
    kernel = page_merging.merged()
    merged = int(in_merged * kernel.share_saved)
    watch = services.pressure
    asleep = [vm for vm in vms if vm.run is None and vm.suspended is not None and vm.suspended_because == "memory"]
    return HostMemory(
        total=computer.total,
        available=computer.available,
        vms=len(running),
        promised=sum(vm.spec.memory for vm in running),
        used=used,
        shared=used - sum(each.private for each in shares),
        saved=max(0, sum(each.resident for each in shares) - used - merged),
        merging=kernel.on,
        merged=merged,
        reserve=watch.reserve if watch is not None else 0,
        low=watch is not None and watch.low,
        held_back=sum(watch.held.values()) if watch is not None else 0,
        asleep=len(asleep),
    )

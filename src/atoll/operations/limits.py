"""What a VM may take of its computer: checked, and put on one that runs.

Disks are held back by QEMU, so that it works for an ordinary user as well; processors' time by a control group.
"""

from msgspec.structs import replace

from atoll.errors import InvalidInput
from atoll.host import cgroups
from atoll.model.requests import CreateRequest, SetRequest
from atoll.model.spec import LimitSpec, VmSpec
from atoll.model.units import parse_size
from atoll.model.vm import Vm
from atoll.qemu.monitor import Monitor

SMALLEST_SHARE = 0.01
"""Of a processor: the kernel counts in milliseconds of a tenth of a second."""
LARGEST = 10**15
"""Bytes or operations in a second (THROTTLE_VALUE_MAX in QEMU's throttle.h)."""
GROUP = "limits"
"""All disks of a VM are held back together."""


def changed(limits: LimitSpec, request: CreateRequest | SetRequest) -> LimitSpec:
    """The limits with what the request asks for. Raises `InvalidInput`."""
    if request.cpu_limit is not None:
        if request.cpu_limit and not SMALLEST_SHARE <= request.cpu_limit <= 4096:
            raise InvalidInput(
                f"a VM can't have {request.cpu_limit:g} processors' time",
                f"it is {SMALLEST_SHARE} to 4096, or 0 for no limit",
                "Write it like --cpu-limit 1.5.",
            )
        limits = replace(limits, cpus=request.cpu_limit)
    if request.io_limit is not None:
        text = request.io_limit.removesuffix("/s") if isinstance(request.io_limit, str) else request.io_limit
        limits = replace(limits, io_bytes=_checked(parse_size(text), "--io-limit 50MiB"))
    if request.iops_limit is not None:
        limits = replace(limits, io_operations=_checked(request.iops_limit, "--iops-limit 500"))
    return limits


def _checked(number: int, example: str) -> int:
    if not 0 <= number <= LARGEST:
        raise InvalidInput(f"{number} in a second is no limit", f"it is up to {LARGEST}", f"Write it like {example}.")
    return number


async def hold_back_disks(monitor: Monitor, limits: LimitSpec) -> None:
    """From now on, and whatever snapshots do to the disks' nodes."""
    for block in await monitor.execute("query-block"):
        if block.get("qdev") and block.get("inserted") and not block["inserted"]["ro"]:
            rates = {"bps": limits.io_bytes, "bps_rd": 0, "bps_wr": 0}
            rates |= {"iops": limits.io_operations, "iops_rd": 0, "iops_wr": 0}
            await monitor.execute("block_set_io_throttle", {"id": block["qdev"], "group": GROUP} | rates)


def processors(spec: VmSpec) -> float:
    """How many processors' time it may take: without a limit what its CPUs and its I/O could use."""
    return spec.limits.cpus or spec.cpu.maximum + 1


async def apply(monitor: Monitor, vm: Vm, wanted: VmSpec) -> dict[str, str]:
    """Change the limits of a VM that runs; by setting, why one couldn't be: nothing if it could."""
    told: dict[str, str] = {}
    before, after = vm.spec.limits, wanted.limits
    if (before.io_bytes, before.io_operations) != (after.io_bytes, after.io_operations):
        await hold_back_disks(monitor, after)
        told |= {"io-limit": "", "iops-limit": ""}
    if before.cpus != after.cpus:
        told["cpu-limit"] = cgroups.change_cpus(vm.id, processors(replace(vm.spec, limits=after)))
    return told

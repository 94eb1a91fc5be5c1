"""Devices that come and go while the guest runs: in the ports that are kept free for them."""

from typing import Any

from atoll.errors import EngineFailed, TimedOut
from atoll.qemu.monitor import Monitor

UNPLUG_TIME = 20.0
"""Seconds that a guest has to let go of a device."""


async def free_port(monitor: Monitor) -> str | None:
    """A hot-plug port with nothing in it."""
    buses: list[dict[str, Any]] = await monitor.execute("query-pci")
    for device in buses[0]["devices"]:
        if device.get("qdev_id", "").startswith("hotplug") and not device.get("pci_bridge", {}).get("devices"):
            return str(device["qdev_id"])
    return None


async def unplug(monitor: Monitor, device: str) -> str:
    """Returns why it must wait for the next start, or nothing."""
    async with monitor.events(["DEVICE_DELETED"]) as deleted:
        try:
            await monitor.execute("device_del", {"id": device})
        except EngineFailed as error:
            if "not found" in error.why:
                return ""
            return f"the guest was started with it ({error.why})"
        try:
            while (await deleted.next(timeout=UNPLUG_TIME)).get("data", {}).get("device") != device:
                continue
        except TimedOut:
            return "the guest doesn't let go of it"
    return ""

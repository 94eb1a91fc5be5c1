"""CPU model, topology and accelerator arguments."""

from atoll.model.launch import Capabilities
from atoll.model.spec import CpuSpec, VmSpec

TCG_CACHE_MIB = 256
"""Emulation's translated code, at most. QEMU's own default is 1 GiB a VM; a whole Debian boot fills about 200 MiB."""


def cpu_model(spec: VmSpec, *, accelerator: str, caps: Capabilities) -> str:
    """The `-cpu` argument. Emulated RISC-V gets `rv64`: `max` with its vector unit boots half as fast."""
    if spec.cpu.model != "default":
        return spec.cpu.model
    if accelerator != "tcg":
        return "host"
    if spec.arch == "riscv64":
        return "rv64"
    if spec.arch == "aarch64":
        # QARMA5 pointer authentication costs half of the speed under emulation; this variant is as good for guests.
        return "max,pauth-impdef=on" if caps.has(cpu="max") else "cortex-a72"
    return "max"


def topology(cpu: CpuSpec) -> str:
    """The `-smp` argument. Every dimension is said, so that the guest's view doesn't hang on QEMU's defaults."""
    cores = max(1, cpu.maximum // (cpu.sockets * cpu.threads))
    return f"cpus={cpu.count},maxcpus={cpu.maximum},sockets={cpu.sockets},cores={cores},threads={cpu.threads}"


def accelerator_argument(accelerator: str) -> str:
    """The `-accel` argument."""
    return f"tcg,thread=multi,tb-size={TCG_CACHE_MIB}" if accelerator == "tcg" else accelerator

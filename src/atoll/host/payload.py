"""The smallest 64-bit guests: they prove that an accelerator runs one. Each ends its QEMU with an exit code of its own.

`SOURCE` is what `CODE` was assembled from (GNU as); a test assembles it again. They are our own work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.model.spec import Arch


@dataclass(frozen=True)
class Payload:
    """A tiny guest: how QEMU loads it, and the exit code of a QEMU in which it ran."""

    arguments: Sequence[str]
    """What stands before the payload's file name in QEMU's argv."""
    content: bytes
    exit_code: int


SOURCE: dict[Arch, str] = {
    # A BIOS. It is mapped below 4 GiB, where the processor starts, and once more below 1 MiB, where it goes on.
    # Two MiB are mapped one to one by tables at 0x1000, then 64-bit mode is entered straight from real mode.
    # Only in that mode the number's upper half comes down to 42; isa-debug-exit makes 42 * 2 + 1 of it.
    "x86_64": """
        .code16
        start:
            xor %ax, %ax
            mov %ax, %ds
            movl $0x2003, 0x1000
            movl $0x3003, 0x2000
            movl $0x0083, 0x3000
            mov $0x20, %eax                             # physical address extension
            mov %eax, %cr4
            mov $0x1000, %eax
            mov %eax, %cr3
            mov $0xc0000080, %ecx                       # EFER: long mode enable
            rdmsr
            or $1, %ah
            wrmsr
            lgdtl %cs:(table - start + 0xff00)
            mov $0x80000001, %eax                       # paging and protection at once
            mov %eax, %cr0
            ljmpl $8, $(long_mode - start + 0xfff00)
        .code64
        long_mode:
            mov $0x2a00000000, %rax
            shr $32, %rax
            out %al, $0xf4
        1:  hlt
            jmp 1b
        .balign 8
            .quad 0, 0x00af9a000000ffff                 # descriptors: none, 64-bit code
        table:
            .word 15
            .long table - 16 - start + 0xfff00
        .org 0xf0                                       # where the processor starts
        .code16
            ljmpw $0xf000, $0xff00
        .org 0x100
    """,
    # PSCI's SYSTEM_OFF (Arm DEN0022); only a guest that runs can ask for it.
    "aarch64": """
            movz w0, #0x8400, lsl #16
            movk w0, #8
            hvc #0
            b .
    """,
    # The virt machine's test device: 0x3333 in the lower half ends QEMU with the upper half, 42.
    "riscv64": """
            lui a0, 0x100
            lui a1, 0x2a3
            addi a1, a1, 0x333
            sw a1, 0(a0)
            j .
    """,
}

CODE: dict[Arch, bytes] = {
    "x86_64": bytes.fromhex("""
        31 c0 8e d8 66 c7 06 00 10 03 20 00 00 66 c7 06 00 20 03 30 00 00 66 c7 06 00 30 83 00 00 00 66
        b8 20 00 00 00 0f 22 e0 66 b8 00 10 00 00 0f 22 d8 66 b9 80 00 00 c0 0f 32 80 cc 01 0f 30 2e 66
        0f 01 16 80 ff 66 b8 01 00 00 80 0f 22 c0 66 ea 56 ff 0f 00 08 00 48 b8 00 00 00 00 2a 00 00 00
        48 c1 e8 20 e6 f4 f4 eb fd 8d b4 00 00 8d 74 00 00 00 00 00 00 00 00 00 ff ff 00 00 00 9a af 00
        0f 00 70 ff 0f
    """).ljust(0xF0, b"\0")
    + bytes.fromhex("ea 00 ff 00 f0").ljust(16, b"\0"),
    "aarch64": bytes.fromhex("00 80 b0 52 00 01 80 72 02 00 00 d4 00 00 00 14"),
    "riscv64": bytes.fromhex("37 05 10 00 b7 35 2a 00 93 85 35 33 23 20 b5 00 6f 00 00 00"),
}

BIOS_SIZE = 64 * 1024
"""Bytes; QEMU takes a BIOS in multiples of this. The code is at its end."""

PAYLOADS: dict[Arch, Payload] = {
    "x86_64": Payload(
        arguments=("-machine", "q35", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"),
        content=CODE["x86_64"].rjust(BIOS_SIZE, b"\0"),
        exit_code=42 * 2 + 1,
    ),
    "aarch64": Payload(arguments=("-machine", "virt", "-kernel"), content=CODE["aarch64"], exit_code=0),
    "riscv64": Payload(
        arguments=("-machine", "virt", "-bios", "none", "-kernel"), content=CODE["riscv64"], exit_code=42
    ),
}

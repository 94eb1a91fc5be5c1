"""The filter of system calls: run by an interpreter of classic BPF, and for real by the kernel."""

import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.host import kernel, seccomp
from atoll.host.jail import Jail
from atoll.host.seccomp import ALLOW, DENY_ENOSYS, DENY_EPERM, KILL, filter_program
from atoll.host.spawn import Program, spawn

X86, ARM = 0xC000003E, 0xC00000B7
FILTER = filter_program(own_pid=1, machine="x86_64")


def answer(program: bytes, number: int, arguments: tuple[int, ...] = (), *, arch: int = X86) -> int:
    """What the kernel would do with a system call (struct seccomp_data: number, arch, where from, six arguments)."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        operation, true, false, operand = code[at]
        at += 1
        if operation == 0x06:
            return int(operand)
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, operand)[0]
            continue
        if operation == 0x54:
            accumulator &= operand
            continue
        taken = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: bool(accumulator & operand)}
        at += true if taken[operation] else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_every_denied_call_is_refused_and_reading_and_writing_are_not(machine: str) -> None:
    program = filter_program(own_pid=1, machine=machine)
    arch, column = seccomp._ARCHITECTURES[machine]
    for name, numbers in seccomp._DENIED.items():
        if numbers[column] is not None:
            assert answer(program, numbers[column] or 0, arch=arch) == DENY_EPERM, name
    for number in (0, 1) if column == 0 else (63, 64):
        assert answer(program, number, arch=arch) == ALLOW


def test_another_kind_of_program_is_killed() -> None:
    assert answer(FILTER, 0, arch=ARM) == KILL
    # The same call by its number in the table for 32-bit pointers.
    assert answer(FILTER, 41 | 0x40000000) == DENY_EPERM


def test_threads_may_be_made_but_no_namespaces() -> None:
    clone, clone3, thread_flags = 56, 435, 0x3D0F00
    assert answer(FILTER, clone, (thread_flags,)) == ALLOW
    assert answer(FILTER, clone, (0x10000000 | 17,)) == DENY_EPERM
    assert answer(FILTER, clone3) == DENY_ENOSYS


def test_memory_that_no_limit_counts_is_refused() -> None:
    private, shared, anonymous = 2, 1, 0x20
    assert answer(FILTER, 9, (0, 4096, 3, private | anonymous)) == ALLOW
    assert answer(FILTER, 9, (0, 4096, 3, shared)) == ALLOW
    assert answer(FILTER, 9, (0, 4096, 3, shared | anonymous)) == DENY_EPERM


@given(st.integers(0, 2**32 - 1))
def test_only_own_threads_may_be_signalled(pid: int) -> None:
    assert answer(FILTER, 234, (pid, 5, 6)) == (ALLOW if pid == 1 else DENY_EPERM)


@given(st.integers(0, 2**64 - 1))
def test_limits_may_be_read_only(new_limit: int) -> None:
    assert answer(FILTER, 302, (0, 7, new_limit)) == (ALLOW if new_limit == 0 else DENY_EPERM)


@given(st.integers(0, 600), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_every_call_gets_an_answer(number: int, arguments: list[int]) -> None:
    assert answer(FILTER, number, tuple(arguments)) in (ALLOW, DENY_EPERM, DENY_ENOSYS)


@pytest.mark.skipif(not kernel.seccomp_filters() or not seccomp.known(), reason="this kernel filters nothing")
def test_a_program_behind_it_has_threads_and_no_sockets(tmp_path: Path) -> None:
    script = (
        "import _thread, os, resource, signal, sys, threading\n"
        "done = threading.Event(); _thread.start_new_thread(done.set, ()); assert done.wait(10)\n"
        "signal.raise_signal(0); resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "import socket\n"
        "try: socket.socket(); print('made a socket')\n"
        "except PermissionError: print('refused')\n"
    )
    told, (ended, held) = tmp_path / "told", os.pipe()
    with told.open("wb") as output:
        argv = (sys.executable, "-I", "-S", "-c", script)
        program = Program(argv=argv, descriptors=(held,), output=output.fileno())
        spawn(program, Jail(namespaces=False, filtered=True))
    os.close(held)
    assert os.read(ended, 1) == b"", "it has ended"
    os.close(ended)
    assert told.read_text() == "refused\n"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_who_serves_files_makes_no_processes_and_no_setuid_programs(machine: str) -> None:
    program = filter_program(own_pid=1, serves_files=True, machine=machine)
    arch, column = seccomp._ARCHITECTURES[machine]
    assert answer(program, seccomp._CLONE[column], (0,), arch=arch) == DENY_EPERM
    for numbers, place in seccomp._MODES:
        if (number := numbers[column]) is None:
            continue
        for mode, expected in ((0o644, ALLOW), (0o1777, ALLOW), (0o4755, DENY_EPERM), (0o2755, DENY_EPERM)):
            arguments = tuple(mode if each == place else 0o6000 for each in range(4))
            assert answer(program, number, arguments, arch=arch) == expected, (number, oct(mode))

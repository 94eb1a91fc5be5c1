"""How a request becomes an argv in the guest. The shells here are the host's own."""

import subprocess

import pytest

from atoll.errors import InvalidInput
from atoll.model.vm import ExecRequest
from atoll.operations import guest_scripts


def run(request: ExecRequest) -> bytes:
    return subprocess.run(guest_scripts.command_of(request), capture_output=True, check=True).stdout


def test_words_and_variables_arrive_as_they_were() -> None:
    words = ("printf", "%s|", "a b", "", "-x", "x\ny", "$HOME", "'\"\\", "é😀")
    assert run(ExecRequest(argv=words, env={"A.B": "1\n2"})).decode() == "".join(f"{w}|" for w in words[2:])
    assert run(ExecRequest(argv=("printenv", "A.B"), env={"A.B": "1 \n2"})) == b"1 \n2\n"


def test_a_program_whose_name_looks_like_a_variable_is_run() -> None:
    request = ExecRequest(argv=("./a=b",), env={"X": "1"})
    failed = subprocess.run(guest_scripts.command_of(request), capture_output=True, check=False)
    assert failed.returncode == 127


@pytest.mark.parametrize(
    "request_",
    [
        ExecRequest(argv=()),
        ExecRequest(argv=("",)),
        ExecRequest(argv=("a\0b",)),
        ExecRequest(argv=("a\udcff",)),
        ExecRequest(argv=("a",), env={"": "x"}),
        ExecRequest(argv=("a",), env={"a=b": "x"}),
        ExecRequest(argv=("a",), cwd="relative"),
        ExecRequest(argv=("a",), user="-c"),
    ],
)
def test_what_no_program_can_be_given_is_refused(request_: ExecRequest) -> None:
    with pytest.raises(InvalidInput):
        guest_scripts.command_of(request_)


@pytest.mark.parametrize(
    "script",
    [
        guest_scripts.RELAY,
        guest_scripts.RUN,
        guest_scripts.RUN_WITH_STDIN,
        guest_scripts.RUN_CAPTURED,
        guest_scripts.KILL,
    ],
)
def test_every_script_is_one_for_a_plain_shell(script: str) -> None:
    subprocess.run(["dash", "-n", "-c", script], check=True)

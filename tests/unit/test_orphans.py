"""What a killed Atoll had started is ended by who tidies up after it, with its children, and nobody else is."""

import subprocess
import sys
from pathlib import Path

from atoll.host.orphans import end_orphans_of

PARENT = "import subprocess, sys; subprocess.Popen(['sleep', '60'], stdout=sys.stdout); print(flush=True); input()"


def test_a_program_at_work_on_the_folder_ends_with_its_children(tmp_path: Path) -> None:
    folder = tmp_path / "image-0123"
    with (
        subprocess.Popen(
            [sys.executable, "-c", PARENT, folder / "root.tar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as parent,
        subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger,
    ):
        assert parent.stdout is not None
        parent.stdout.readline()
        end_orphans_of(folder)
        assert parent.wait(5) == -9
        # Its child had the other end of the pipe.
        assert parent.stdout.read() == b""
        assert stranger.poll() is None
        stranger.kill()

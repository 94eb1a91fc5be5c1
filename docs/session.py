"""Runs the session of the README in a home of its own, and draws what was said: `.venv/bin/python docs/session.py`."""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
SESSION = """\
atoll run tiny --name web --quiet -- uname -sr
atoll exec web -- sh -c 'echo precious > /root/file; sync'
atoll snapshot web before -m 'all is well'
atoll exec web -- rm /root/file
atoll restore web before
atoll exec web -- cat /root/file
atoll fork web -n 3 --name 'try-{n}'
atoll exec try-2 -- sh -c 'hostname; cat /root/file'
atoll ls
atoll history web
atoll rm --force web try-1 try-2 try-3
"""


def main() -> None:
    """Draw the session into session.svg."""
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory(prefix="atoll-session-") as home:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "ATOLL_HOME": home, "PATH": path, "COLUMNS": "108"}
        subprocess.run("atoll image build tiny", shell=True, env=env, check=True, capture_output=True)
        for command in SESSION.splitlines():
            done = subprocess.run(command, shell=True, env=env, check=True, capture_output=True, text=True)
            console.print(Text(f"$ {command}", style="bold"))
            console.print(Text((done.stdout + done.stderr).rstrip("\n"))) if done.stdout + done.stderr else None
    drawn = console.export_svg(title="atoll")
    # The reader's own fonts do; a picture shall ask no other computer for anything.
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    (HERE / "session.svg").write_text(drawn)


if __name__ == "__main__":
    main()

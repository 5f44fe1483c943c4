"""The servers of the tests are private: they end with the process that started them, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.servers import wait_until

SCRIPT = """
import sys, time, pathlib
from tests.servers import Processes
processes = Processes(pathlib.Path(sys.argv[1]), {"PATH": "/usr/bin:/bin"})
processes.start("server", "sleep", "300")
print(processes.running["server"].pid, flush=True)
time.sleep(300)
"""


def test_a_server_does_not_outlive_a_test_run_that_was_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as runner:
        assert runner.stdout is not None
        server = int(runner.stdout.readline())
        os.kill(server, 0)
        os.killpg(runner.pid, signal.SIGKILL)

    def gone() -> bool:
        try:
            state = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"  # whoever inherited it has not looked yet

    wait_until("the server is gone", gone, 30)

"""Nothing that Ray tests start outlives pytest, even if that is killed."""

import signal
import subprocess
import sys

import pytest

from tests.serving.processes import ROOT, wait_for
from tests.serving.ray_watchdog import TESTS, marked

PROGRAM = """
import os, subprocess, time
from tests.serving.ray_watchdog import TESTS, watch
watch()
subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(os.environ[TESTS], flush=True)
time.sleep({seconds})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("killed", [True, False])
def test_what_they_start_ends_with_pytest(killed: bool) -> None:
    program = PROGRAM.format(seconds=1000 if killed else 0)
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        mark = process.stdout.readline().strip()
        if killed:
            assert len(marked(TESTS, mark)) == 1
            process.send_signal(signal.SIGKILL)
    wait_for(lambda: not marked(TESTS, mark), "the end of what it started")

"""A forked worker is what a started one is, so that tests with forks prove the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.forks import ForkedProcess, can_fork, fork
from testbed.processes import SOURCE, ServerFailed, poll, spawn
from workerkit.process import is_process_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG, so only it forks")

FACTS = """
import os, sys
import only_here
print(os.getcwd(), os.environ["ANSWER"], sorted(os.environ), os.getsid(0) == os.getpid(), sys.argv, __name__, __file__)
print(sys.stdin.read(), file=sys.stderr)
"""
NODE = "import worker; print(worker.NODE)"
OWNER = """
import os, sys, time
from pathlib import Path
from testbed.forks import fork
folder = Path(sys.argv[1])
print(fork([str(folder / "sleeps.py")], folder / "output", dict(os.environ), folder).pid, flush=True)
time.sleep(60)
"""
SLEEPS = "import time; print('awake', flush=True); time.sleep(60)"

Run = Callable[..., ForkedProcess]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Forks a program with this text, and waits until it has printed something if asked to."""

    def run(text: str, *, name: str = "program.py", waits: bool = False) -> ForkedProcess:
        output = tmp_path / f"{name}.txt"
        (tmp_path / name).write_text(text)
        process = fork([str(tmp_path / name)], output, dict(os.environ), tmp_path)
        if waits:
            poll(output.read_text, 30, description="the program's output")
        return process

    return run


def test_a_fork_sees_what_a_started_process_sees(tmp_path: Path) -> None:
    for name, text in (("program.py", FACTS), ("only_here.py", "")):
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "ANSWER": "42"}
    command = [str(tmp_path / "program.py"), "1"]
    forked = fork(command, tmp_path / "forked.txt", environment, tmp_path)
    spawned = spawn([sys.executable, *command], tmp_path / "spawned.txt", environment, tmp_path)
    assert (forked.wait(60), spawned.wait(60)) == (0, 0)
    assert (tmp_path / "forked.txt").read_text() == (tmp_path / "spawned.txt").read_text()


def test_each_fork_makes_the_workers_node_anew(run: Run, tmp_path: Path) -> None:
    assert [run(NODE, name=name).wait(60) for name in ("one.py", "two.py")] == [0, 0]
    assert (tmp_path / "one.py.txt").read_text() != (tmp_path / "two.py.txt").read_text()


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [("", 0), ("import sys; sys.exit(3)", 3), ("raise ValueError", 1), ("import os; os.kill(os.getpid(), 15)", -15)],
)
def test_the_exit_code_is_that_of_popen(run: Run, text: str, exit_code: int) -> None:
    process = run(text)
    assert (process.wait(30), process.poll(), process.returncode) == (exit_code,) * 3


def test_a_fork_that_has_ended_keeps_its_process_id_until_it_is_waited_for(run: Run) -> None:
    process = run("print('ended')", waits=True)
    poll(lambda: not is_process_alive(process.pid), 30)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(30) == 0
    poll(lambda: not Path(f"/proc/{process.pid}").exists(), 30)


def test_a_fork_that_runs_has_no_exit_code_and_takes_signals(run: Run) -> None:
    process = run(SLEEPS, waits=True)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


def test_a_fork_that_cant_begin_raises(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="was not started"):
        fork(["program.py"], tmp_path / "output.txt", dict(os.environ), tmp_path / "no such folder")


def test_a_fork_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], cwd=SOURCE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    with owner.stdout as lines:
        pid = int(lines.readline())
    owner.kill()
    owner.wait()
    poll(lambda: not is_process_alive(pid), 30, description="the end of the fork")


@pytest.mark.parametrize("variable", ["LD_PRELOAD", "PYTHONUTF8", "SSL_CERT_FILE"])
def test_what_takes_effect_before_a_fork_needs_a_new_process(variable: str) -> None:
    assert can_fork(dict(os.environ))
    assert not can_fork({**os.environ, variable: "other"})

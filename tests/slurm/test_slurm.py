"""Training under a real Slurm: two nodes, a crash, a preemption, and the end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm import one_machine

from benchmarks import fault_runs
from benchmarks.fault_remains import steps
from moe_jax.interop.orbax_files import find_checkpoint


def _wait(holds: Callable[[], Any], text: Callable[[], str]) -> None:
    end = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < end, text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(bool(one_machine.missing()), reason=one_machine.missing() or "-")
def test_a_job_is_queued_again_after_a_crash_and_a_preemption(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    changes = {"training.num_steps": 10**6, "training.eval_every_steps": 10**6}
    changes |= {"data.holdout_every": 0, "checkpoint.every_steps": 20}
    arguments = fault_runs.flags(fault_runs.write_corpus(tmp_path / "corpus"), workdir, changes)

    def out() -> str:
        return "\n".join(f"{f.name}:\n{f.read_text()}" for f in sorted(tmp_path.glob("*.out")))

    with tempfile.TemporaryDirectory() as folder, one_machine.cluster(Path(folder)) as environment:
        environment["PYTHONPATH"] = str(fault_runs.ROOT)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

        def ask(*command: str) -> str:
            ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
            assert ran.returncode == 0, (command, ran)
            return ran.stdout.decode().strip()

        script = str(fault_runs.ROOT / "launch" / "slurm.sbatch")
        job = ask("sbatch", "--parsable", script, *arguments)

        def shown() -> dict[str, str]:
            fields = ask("scontrol", "show", "job", job).split()
            return dict(field.split("=", 1) for field in fields if "=" in field)

        def trains(restarts: int) -> Callable[[], bool]:
            def holds() -> bool:
                return out().count("  loss ") > out().count("compiled in") > restarts

            return holds

        _wait(trains(0), out)
        _wait(lambda: (workdir / "checkpoints").exists() and find_checkpoint(workdir), out)
        os.kill(json.loads((workdir / "lock").read_text())["process"], signal.SIGKILL)
        _wait(trains(1), out)
        assert shown()["Restarts"] == "1"
        # What --signal sends, two minutes before the time is up.
        ask("scancel", "--signal=USR1", job)
        _wait(lambda: shown()["JobState"] not in ("RUNNING", "COMPLETING"), out)
        preempted = max(steps(workdir))
        _wait(trains(2), out)
        ask("scancel", "--signal=INT", job)
        _wait(lambda: shown()["JobState"] == "COMPLETED", out)
        assert shown()["Restarts"] == "2"
    text = (tmp_path / f"slurm-{job}.0.out").read_text()
    assert "processes: 2" in text and f"resuming    from step {preempted}\n" in text, text
    assert steps(workdir) == list(range(1, max(steps(workdir)) + 1))

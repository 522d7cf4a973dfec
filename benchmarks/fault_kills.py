"""SIGKILL at random moments, and whether the run that goes on is the one that was never killed."""

import random
import socket
import time
from pathlib import Path
from typing import Any

from benchmarks import fault_runs
from benchmarks.fault_processes import finish, start, wait
from benchmarks.fault_remains import newest_whole, same, steps

# A step takes some hundredths of a second, a save some tenths: most kills meet one in progress.
# Nothing is held out: an evaluation, which takes seconds to compile, would meet all kills.
LONG = {"training.num_steps": 40, "checkpoint.every_steps": 3, "data.holdout_every": 0}


def kills(folder: Path, rng: random.Random, number: int) -> dict[str, Any]:
    """One run at a time is killed again and again until it is done."""
    source = fault_runs.write_corpus(folder / "corpus")
    undisturbed, workdir, log = folder / "undisturbed", folder / "killed0", folder / "log"
    assert finish(fault_runs.flags(source, undisturbed, LONG), log) == 0, log.read_text()
    done, lost, runs, whole, half_written = 0, [0], 0, 0, 0
    while done < number or runs == 0 or steps(workdir):
        log.write_text("")
        process = start(fault_runs.flags(source, workdir, LONG), log)
        if done < number:
            sleep_until_a_moment(process, log, rng, 1)
            process.kill()
        process.join()
        _check_resumption(log.read_text(), whole)
        if process.exitcode == 0:
            assert same(workdir, undisturbed), f"{workdir} differs from the undisturbed run"
            runs, whole = runs + 1, 0
            workdir = folder / f"killed{runs}"
            continue
        assert process.exitcode == -9, log.read_text()[-3000:]
        done, before, whole = done + 1, max(steps(workdir), default=0), newest_whole(workdir)
        lost.append(before - whole)
        # One that is being written while the one before it is the newest, and no older.
        assert lost[-1] <= 2 * LONG["checkpoint.every_steps"], (before, whole)
        half_written += any(workdir.glob("checkpoints/*tmp*"))
        print(f"kill {done}: at step {before}, newest whole checkpoint {whole}", flush=True)
    return {
        **{"kills": done, "during a save": half_written, "runs": runs, "equal to the bit": runs},
        "most steps lost": max(lost),
    }


def pair_kills(folder: Path, rng: random.Random, number: int) -> dict[str, Any]:
    """One process out of two is killed; the other must leave, and both start again."""
    source = fault_runs.write_corpus(folder / "corpus")
    undisturbed, workdir = folder / "undisturbed", folder / "killed0"
    logs = [folder / "log0", folder / "log1"]

    def pair(workdir: Path) -> list[Any]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        arguments = fault_runs.flags(source, workdir, LONG)
        arguments += [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
        for log in logs:
            log.write_text("")
        return [start([*arguments, f"--process_id={i}"], log) for i, log in enumerate(logs)]

    for process, log in zip(pair(undisturbed), logs, strict=True):
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
    done, slowest, runs, whole = 0, 0.0, 0, 0
    while done < number or runs == 0 or steps(workdir):
        both, victim = pair(workdir), rng.randrange(2)
        if done < number:
            wait(both[0], lambda: "processes: 2" in logs[0].read_text(), logs[0])
            sleep_until_a_moment(both[0], logs[0], rng, 5)  # whose steps wait for each other
            both[victim].kill()
        begin = time.monotonic()
        both[victim].join()
        both[1 - victim].join(120)
        seconds, codes = time.monotonic() - begin, [process.exitcode for process in both]
        text = "".join(log.read_text()[-3000:] for log in logs)
        _check_resumption(logs[0].read_text(), whole)
        if codes == [0, 0]:
            assert same(workdir, undisturbed), f"{workdir} differs from the undisturbed run"
            runs, whole = runs + 1, 0
            workdir = folder / f"killed{runs}"
            continue
        assert None not in codes and 0 not in codes and seconds < 60, (codes, seconds, text)
        done, whole, slowest = done + 1, newest_whole(workdir), max(slowest, seconds)
        before = max(steps(workdir), default=0)
        assert before - whole <= 2 * LONG["checkpoint.every_steps"], (before, whole)
        print(
            f"kill {done}: of process {victim} at step {before}, newest whole checkpoint {whole}; "
            f"the other left with {codes[1 - victim]} after {seconds:.1f} s",
            flush=True,
        )
    return {
        **{"kills": done, "runs": runs, "equal to the bit": runs},
        "slowest leaving of the other, s": round(slowest, 1),
    }


def sleep_until_a_moment(process: Any, log: Path, rng: random.Random, seconds: float) -> None:
    """One in five while the run starts, the others in its first seconds; or it is over by then."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 5))
        return
    wait(process, lambda: process.exitcode is not None or "  loss " in log.read_text(), log)
    time.sleep(rng.uniform(0, seconds))


def _check_resumption(text: str, whole: int) -> None:
    """A run that came so far went on from the newest whole checkpoint; 0: there was none."""
    if "parameters" in text:
        assert ("resuming" in text) == (whole > 0), text
        assert not whole or f"resuming    from step {whole}\n" in text, text
        assert "damaged" not in text or "never finished" in text, text

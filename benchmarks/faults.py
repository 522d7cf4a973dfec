"""Faults done to very small runs, on purpose, and what is left of the runs.

    python -m benchmarks.faults --output=benchmarks/results/faults.json

    python -m benchmarks.faults --only=kills --kills=5

Real processes, killed at random moments; files damaged; disks filled; configs that cannot run. Each
part says how many it tried and how many ended as they must, and stops with an error if any did not.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import fault_mistakes, fault_runs, record
from benchmarks.fault_processes import finish, start, wait

OUTPUT = flags.DEFINE_string("output", None, "JSON to write.")
ONLY = flags.DEFINE_list("only", None, "Parts to run; all by default.")
KILLS = flags.DEFINE_integer("kills", 50, "Of single processes.")
PAIR_KILLS = flags.DEFINE_integer("pair_kills", 20, "Of one process out of two.")
CORRUPTIONS = flags.DEFINE_integer("corruptions", 30, "Of checkpoint files.")
SEED = flags.DEFINE_integer("seed", 0, "Of what is random.")

LONG = {"training.num_steps": 40, "checkpoint.every_steps": 3, "training.eval_every_steps": 20}
NOT_COMPARED = {"tokens_per_second", "mfu", "checkpoint_stall_seconds", "data_wait_fraction"}


# What is compared -----------------------------------------------------------------------------


def rows(workdir: Path) -> list[dict[str, Any]]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows(workdir)]


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint."""
    from moe_jax.interop.lazy import flatten, whole
    from moe_jax.interop.orbax_files import find_checkpoint, read_arrays

    path = find_checkpoint(workdir)
    assert path is not None, workdir
    leaves = flatten(read_arrays(path)).items()
    return {"/".join(names): np.asarray(lazy.read(whole(lazy.shape))) for names, lazy in leaves}


def same(workdir: Path, undisturbed: Path) -> bool:
    """Whether loss curve and final state are equal, bit for bit."""
    a, b = arrays(workdir), arrays(undisturbed)
    equal = a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    return equal and curve(workdir) == curve(undisturbed)


# Parts ----------------------------------------------------------------------------------------


def kills(folder: Path, rng: random.Random) -> dict[str, Any]:
    """SIGKILL at random moments, again and again, of one run, until it is done; then the next."""
    source, done, lost, runs, equal = str(folder / "corpus" / "*.txt"), 0, [], 0, 0
    undisturbed = folder / "undisturbed"
    assert finish(fault_runs.flags(source, undisturbed, LONG), folder / "log") == 0
    while done < KILLS.value:
        workdir, runs = folder / f"killed{runs}", runs + 1
        process = start(fault_runs.flags(source, workdir, LONG), folder / "log")
        while done < KILLS.value and len(steps(workdir)) < LONG["training.num_steps"] - 5:
            # Some steps on, at any moment of one: saves are in progress most of the time.
            wait_for_a_step(process, workdir, folder / "log")
            time.sleep(rng.uniform(0, 0.3))
            before = max(steps(workdir), default=0)
            process.kill()
            process.join()
            done += 1
            whole = newest_whole(workdir)
            lost.append(before - whole)
            process = start(fault_runs.flags(source, workdir, LONG), folder / "log")
            print(f"kill {done}: at step {before}, newest whole checkpoint {whole}", flush=True)
        process.join()
        assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
        equal += same(workdir, undisturbed)
    assert equal == runs, f"{runs - equal} of {runs} runs differ from the undisturbed one"
    return {"kills": done, "runs": runs, "equal to the bit": equal, "most steps lost": max(lost)}


def steps(workdir: Path) -> list[int]:
    return [row["step"] for row in rows(workdir) if "loss" in row]


def wait_for_a_step(process: Any, workdir: Path, log: Path) -> None:
    """Beyond what stands there: a process that starts drops what its checkpoint lacks first."""
    size = len(rows(workdir))
    wait(process, lambda: len(rows(workdir)) not in (0, size), log)
    size = len(rows(workdir))
    wait(process, lambda: len(rows(workdir)) > size, log)


def newest_whole(workdir: Path) -> int:
    from moe_jax.interop import manifest

    folders = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    return max((int(p.name) for p in folders if not manifest.faults(p)), default=0)


def pair_kills(folder: Path, rng: random.Random) -> dict[str, Any]:
    """SIGKILL of one process out of two; the other must leave, and both start again."""
    source = str(folder / "corpus" / "*.txt")

    def pair(workdir: Path) -> list[Any]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        arguments = fault_runs.flags(source, workdir, LONG)
        arguments += [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
        return [start([*arguments, f"--process_id={i}"], folder / "log") for i in (0, 1)]

    undisturbed, workdir = folder / "undisturbed2", folder / "killed_pair"
    for process in pair(undisturbed):
        process.join()
        assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
    done, slowest, runs, equal, both = 0, 0.0, 0, 0, pair(workdir)
    while True:
        enough = len(steps(workdir)) >= LONG["training.num_steps"] - 5
        if done == PAIR_KILLS.value or enough:
            for process in both:
                process.join()
                assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
            runs, equal = runs + 1, equal + same(workdir, undisturbed)
            if done == PAIR_KILLS.value:
                break
            workdir = folder / f"killed_pair{runs}"
            both = pair(workdir)
        wait_for_a_step(both[0], workdir, folder / "log")
        time.sleep(rng.uniform(0, 0.3))
        victim = rng.randrange(2)
        both[victim].kill()
        begin = time.monotonic()
        both[1 - victim].join(60)
        code = both[1 - victim].exitcode
        slowest = max(slowest, time.monotonic() - begin)
        assert code, f"the other process: exit code {code} after {slowest:.0f} s"
        both[victim].join()
        done += 1
        print(f"kill {done}: of process {victim}; the other left with {code}", flush=True)
        both = pair(workdir)
    assert equal == runs, f"{runs - equal} of {runs} runs differ from the undisturbed one"
    return {
        **{"kills": done, "runs": runs, "equal to the bit": equal},
        "slowest leaving of the other, s": round(slowest, 1),
    }


def corruptions(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Truncated, flipped, deleted and swapped files: none passes for whole."""
    from moe_jax.interop import manifest

    source, workdir = str(folder / "corpus" / "*.txt"), folder / "corrupted"
    assert finish(fault_runs.flags(source, workdir), folder / "log") == 0
    newest = workdir / "checkpoints" / str(newest_whole(workdir))
    kinds: dict[str, int] = {}
    for number in range(CORRUPTIONS.value):
        damaged = folder / "damaged" / newest.name
        shutil.copytree(newest, damaged)
        kind = ("truncate", "flip", "delete", "swap")[number % 4]
        files = sorted(f for f in damaged.rglob("*") if f.is_file() and f.stat().st_size)
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        if kind == "truncate":
            os.truncate(file, rng.randrange(len(data)))
        elif kind == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        elif kind == "delete":
            file.unlink()
        else:
            other = rng.choice([f for f in files if f.read_bytes() != bytes(data)])
            file.write_bytes(other.read_bytes())
            other.write_bytes(data)
        assert manifest.faults(damaged), f"{kind} of {file} was not found"
        kinds[kind] = kinds.get(kind, 0) + 1
        shutil.rmtree(damaged.parent)
    # One of them, seen by a run.
    file = max(newest.rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    os.truncate(file, 10)
    log = folder / "log_corrupted"
    more = {"training.num_steps": 14}
    assert finish(fault_runs.flags(source, workdir, more), log) == 0
    text = log.read_text()
    assert f"checkpoint {newest.name} is not whole and set aside: " in text and "resuming" in text
    return {"tried": CORRUPTIONS.value, "found": sum(kinds.values()), **kinds}


def full_disk(folder: Path, rng: random.Random) -> dict[str, Any]:
    """A tmpfs that fills up while a run saves, and has room again later."""
    small = folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small]).returncode:
        return {"skipped": "no right to mount a tmpfs"}
    try:
        source, workdir = str(folder / "corpus" / "*.txt"), small / "run"
        log = folder / "log_full"
        more = LONG | {"checkpoint.max_failed_saves": 100, "training.num_steps": 60}
        process = start(fault_runs.flags(source, workdir, more), log)
        wait(process, lambda: newest_whole(workdir) >= 6, log)
        with (small / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        wait(process, lambda: log.read_text().count("not saved") >= 2, log)
        (small / "filler").unlink()
        process.join()
        text = log.read_text()
        assert process.exitcode == 0, text[-3000:]
        assert newest_whole(workdir) == 60
        assert steps(workdir) == list(range(1, 61)), "rows are missing"
        failed = text.count("not saved")
        # A disk that stays full ends the run.
        shutil.rmtree(workdir)
        with (small / "filler").open("wb", buffering=0) as filler:
            filler.write(bytes(7 * 2**20 + 2**19))
        more |= {"checkpoint.max_failed_saves": 2}
        code = finish(fault_runs.flags(source, workdir, more), log)
        assert code in (2, 3), log.read_text()[-3000:]
        return {
            "saves failed": failed,
            "rows kept": 60,
            "exit code of a disk that stays full": code,
        }
    finally:
        subprocess.run(["umount", small], check=True)


def second_run(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Two runs on one work directory, and a lock left behind."""
    source, workdir, log = (
        str(folder / "corpus" / "*.txt"),
        folder / "shared",
        folder / "log_second",
    )
    first = start(fault_runs.flags(source, workdir, {"training.num_steps": 10**6}), folder / "log")
    wait(first, lambda: bool(steps(workdir)), folder / "log")
    begin = time.monotonic()
    code = finish(fault_runs.flags(source, workdir), log)
    seconds = time.monotonic() - begin
    expected = f"another run writes to the work directory {workdir}: process {first.pid} on "
    assert code == 2 and expected in log.read_text(), log.read_text()
    first.kill()
    first.join()
    assert (workdir / "lock").exists()
    reached = newest_whole(workdir)
    more = {"training.num_steps": max(reached, 1) + 2, "training.stop_after_step": reached + 1}
    assert finish(fault_runs.flags(source, workdir, more), log) == 0, log.read_text()
    return {"second refused in s": round(seconds, 1), "stale lock taken": True}


def clock(folder: Path, rng: random.Random) -> dict[str, Any]:
    """The system's clock jumps back and forth by days; what a run does hangs on none of it."""
    from moe_jax.training import loop

    real, config = time.time, fault_runs.config(str(folder / "corpus" / "*.txt"))
    time.time = lambda: real() + rng.choice([-3, -1, 0, 1, 3]) * 86400
    try:
        loop.train(config, folder / "jumps")
    finally:
        time.time = real
    loop.train(config, folder / "no_jumps")
    assert same(folder / "jumps", folder / "no_jumps")
    return {"runs": 1, "equal to the bit": 1}


def signals(folder: Path, rng: random.Random) -> dict[str, Any]:
    """SIGINT and SIGTERM: the run leaves, goes on, and equals the undisturbed one."""
    source, log = str(folder / "corpus" / "*.txt"), folder / "log_signals"
    undisturbed = folder / "whole"
    assert finish(fault_runs.flags(source, undisturbed, LONG), log) == 0
    workdir, codes = folder / "signalled", []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process = start(fault_runs.flags(source, workdir, LONG), log)
        wait_for_a_step(process, workdir, log)
        os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
        assert newest_whole(workdir) == max(steps(workdir)), "not saved at the last step"
    assert codes == [0, 75, 75], codes
    assert finish(fault_runs.flags(source, workdir, LONG), log) == 0
    # Runs that stop look at the held-out loss there, too.
    losses = [[row for row in curve(path) if "loss" in row] for path in (workdir, undisturbed)]
    assert losses[0] == losses[1]
    return {"exit codes": codes, "equal to the bit": True}


def mistakes(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Configs and inputs that cannot run: a sentence, exit code 2, soon, nothing written."""
    source, slowest, counts = str(folder / "corpus" / "*.txt"), 0.0, {"configs": 0, "inputs": 0}
    for kind, arguments in fault_mistakes.all_of(source, folder):
        log, workdir = folder / "log_mistake", folder / "never"
        log.unlink(missing_ok=True)
        begin = time.monotonic()
        code = finish([*fault_runs.flags(source, workdir), *arguments], log)
        slowest = max(slowest, time.monotonic() - begin)
        text = log.read_text()
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(said) == 1 and "Traceback" not in text, (arguments, code, text)
        assert not workdir.exists(), arguments
        counts[kind] += 1
    return {**counts, "slowest, s": round(slowest, 1)}


PARTS = {
    "mistakes": mistakes,
    "signals": signals,
    "second_run": second_run,
    "corruptions": corruptions,
    "full_disk": full_disk,
    "clock": clock,
    "kills": kills,
    "pair_kills": pair_kills,
}


def main(_: list[str]) -> None:
    results = {}
    for name in ONLY.value or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            fault_runs.write_corpus(Path(folder) / "corpus")
            begin = time.monotonic()
            results[name] = PARTS[name](Path(folder), random.Random(SEED.value))
            print(f"{name}: {results[name]} in {time.monotonic() - begin:.0f} s", flush=True)
        record.save(Path(OUTPUT.value) if OUTPUT.value else None, **results)


if __name__ == "__main__":
    app.run(main)

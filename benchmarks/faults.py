"""Faults done to very small runs, on purpose, and what is left of the runs.

    python -m benchmarks.faults --output=benchmarks/results/faults.json

    python -m benchmarks.faults --only=kills --kills=5

Real processes, killed at random moments; files damaged; disks filled; configs that cannot run. Each
part says how many it tried and how many ended as they must, and stops with an error if any did not.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks import fault_mistakes, fault_runs, record
from benchmarks.fault_kills import LONG, kills, pair_kills
from benchmarks.fault_processes import finish, start, wait
from benchmarks.fault_remains import curve, newest_whole, rows, same, steps
from moe_jax.interop import manifest

OUTPUT = flags.DEFINE_string("output", None, "JSON to write.")
ONLY = flags.DEFINE_list("only", None, "Parts to run; all by default.")
KILLS = flags.DEFINE_integer("kills", 50, "Of single processes.")
PAIR_KILLS = flags.DEFINE_integer("pair_kills", 20, "Of one process out of two.")
CORRUPTIONS = flags.DEFINE_integer("corruptions", 30, "Of checkpoint files.")
SEED = flags.DEFINE_integer("seed", 0, "Of what is random.")

TRAIN_STEP = "moe_jax.training.timing.make_train_step"
# What a run says of a NaN, by its place.
NAMED = {
    "batch": "the loss is not finite",
    "gradient": "the gradient is not finite",
    "expert": "parameters/moe_blocks/moe/gate[0, 7, 15, 7] is not finite",
    "bias": "router_bias/moe_blocks/moe/router/bias[0, 7] is not finite",
}


def corruptions(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Truncated, flipped, deleted and swapped files: none passes for whole."""
    source, workdir = fault_runs.write_corpus(folder / "corpus"), folder / "corrupted"
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
        source, workdir = fault_runs.write_corpus(folder / "corpus"), small / "run"
        log, last = folder / "log", 150
        more = LONG | {"checkpoint.max_failed_saves": 100, "training.num_steps": last}
        process = start(fault_runs.flags(source, workdir, more), log)
        wait(process, lambda: newest_whole(workdir) >= 6, log)
        _fill(small / "filler")
        wait(process, lambda: log.read_text().count("not saved") >= 2, log)
        (small / "filler").unlink()
        process.join()
        text = log.read_text()
        assert process.exitcode == 0, text[-3000:]
        assert newest_whole(workdir) == last
        assert steps(workdir) == list(range(1, last + 1)), "rows are missing"
        failed = text.count("not saved")
        # A disk that stays full ends the run.
        shutil.rmtree(workdir)
        process = start(fault_runs.flags(source, workdir, LONG), log)
        wait(process, lambda: newest_whole(workdir) >= 6, log)
        _fill(small / "filler")
        process.join()
        assert process.exitcode == 3, (process.exitcode, log.read_text()[-3000:])
        assert newest_whole(workdir) >= 6
        return {
            **{"saves failed": failed, "rows kept": last},
            "exit code of a disk that stays full": process.exitcode,
        }
    finally:
        subprocess.run(["umount", small], check=True)


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def read_only(folder: Path, rng: random.Random) -> dict[str, Any]:
    """A directory of checkpoints that may no longer be written to during a run, and later may."""
    source, workdir, log = (
        fault_runs.write_corpus(folder / "corpus"),
        folder / "run",
        folder / "log",
    )
    checkpoints, last = workdir / "checkpoints", 150
    checkpoints.mkdir(parents=True)
    if subprocess.run(["mount", "--bind", checkpoints, checkpoints]).returncode:
        return {"skipped": "no right to mount a directory"}

    def remount(mode: str) -> bool:
        # Refused while a save has files open; root heeds no permission of a file.
        command = ["mount", "-o", f"remount,bind,{mode}", checkpoints]
        return not subprocess.run(command, capture_output=True).returncode

    try:
        more = LONG | {"checkpoint.max_failed_saves": 100, "training.num_steps": last}
        process = start(fault_runs.flags(source, workdir, more), log)
        wait(process, lambda: newest_whole(workdir) >= 6, log)
        wait(process, lambda: remount("ro"), log)
        before = newest_whole(workdir)
        wait(process, lambda: log.read_text().count("not saved") >= 2, log)
        assert newest_whole(workdir) == before
        assert remount("rw")
        process.join()
        text = log.read_text()
        assert process.exitcode == 0, text[-3000:]
        assert newest_whole(workdir) == last and steps(workdir) == list(range(1, last + 1))
        return {"saves failed": text.count("not saved"), "rows kept": last}
    finally:
        subprocess.run(["umount", checkpoints], check=True)


def second_run(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Two runs on one work directory, and a lock left behind."""
    source, workdir, log = (
        fault_runs.write_corpus(folder / "corpus"),
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
    """Python's clock jumps back and forth by days; what a run does hangs on none of it."""
    source, log = fault_runs.write_corpus(folder / "corpus"), folder / "log"
    for name, changed in (("jumps", {"time.time": jumping}), ("undisturbed", {})):
        process = start(fault_runs.flags(source, folder / name, LONG), log, changed)
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
    assert same(folder / "jumps", folder / "undisturbed")
    return {"runs": 1, "equal to the bit": 1}


def jumping(real: Callable[[], float]) -> Callable[[], float]:
    rng = random.Random(0)
    return lambda: real() + rng.choice([-3, -1, 0, 1, 3]) * 86400


def nans(folder: Path, rng: random.Random) -> dict[str, Any]:
    """A NaN at step 5: the update is skipped, what holds it is named, and training recovers."""
    source, found = fault_runs.write_corpus(folder / "corpus"), {}
    for place, named in NAMED.items():
        workdir, log = folder / place, folder / f"log_{place}"
        changed = {TRAIN_STEP: functools.partial(fault_runs.poisoned, place=place, at=5)}
        arguments = fault_runs.flags(source, workdir, {"recovery.max_bad_steps": 2})
        process = start(arguments, log, changed)
        process.join()
        text = log.read_text()
        assert process.exitcode == 0 and "step 5: update skipped: " in text and named in text, text
        losses = [row for row in rows(workdir) if "loss" in row]
        skipped = [row["step"] for row in losses if row["update_skipped"]]
        assert skipped[0] == 5 and len(skipped) < 3 and losses[-1]["loss"] is not None, text
        back = "rolled back" in text
        assert back == (len(skipped) == 2), text
        found[place] = f"{len(skipped)} skipped" + (", rolled back" if back else "")
    return found


def signals(folder: Path, rng: random.Random) -> dict[str, Any]:
    """SIGINT and SIGTERM: the run leaves, goes on, and equals the undisturbed one."""
    source, log = fault_runs.write_corpus(folder / "corpus"), folder / "log_signals"
    undisturbed = folder / "whole"
    assert finish(fault_runs.flags(source, undisturbed, LONG), log) == 0
    workdir, codes = folder / "signalled", []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        log.write_text("")
        process = start(fault_runs.flags(source, workdir, LONG), log)
        wait(process, lambda: "  loss " in log.read_text(), log)
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
    source, slowest = fault_runs.write_corpus(folder / "corpus"), 0.0
    counts = {"configs": 0, "inputs": 0}
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
    "read_only": read_only,
    "clock": clock,
    "nans": nans,
    "kills": lambda folder, rng: kills(folder, rng, KILLS.value),
    "pair_kills": lambda folder, rng: pair_kills(folder, rng, PAIR_KILLS.value),
}


def main(_: list[str]) -> None:
    # Restarts compile nothing anew, which is most of their time.
    cache = Path(tempfile.gettempdir()) / "moe_jax_faults"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = {}
    for name in ONLY.value or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            results[name] = PARTS[name](Path(folder), random.Random(SEED.value))
            print(f"{name}: {results[name]} in {time.monotonic() - begin:.0f} s", flush=True)
        record.save(Path(OUTPUT.value) if OUTPUT.value else None, **results)


if __name__ == "__main__":
    app.run(main)

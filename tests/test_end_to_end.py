"""Whole runs of configs/tiny.py, cut down: resumed, refused, repeated, and by its command."""

import gzip
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import moe_jax
from benchmarks.fault_runs import MODEL
from moe_jax import sharding, validation
from moe_jax.config import Config, UserError
from moe_jax.curriculum import at_stage
from moe_jax.schedules import scheduled
from moe_jax.training.loop import train
from moe_jax.training.step import batch_shape, init_state, make_train_step

ROOT = Path(moe_jax.__path__[0]).parent
CUT = {
    **MODEL,
    "precision.compute_dtype": "float32",
    "optimizer.warmup_steps": 2,
    "optimizer.peak_lr": 0.02,
    # The length changes after steps 2 and 4.
    "data.stages": (
        {"sequence_length": 16, "until_tokens": 512},
        {"sequence_length": 32, "until_tokens": 1024},
        {"sequence_length": 16, "until_tokens": None, "rope_factor": 8.0},
    ),
    "training.num_steps": 6,
    "training.tokens_per_step": 256,
    "training.log_every_steps": 1,
    "training.eval_every_steps": 3,
    "training.eval_batches": 2,
    "training.sample_tokens": 0,
    "checkpoint.every_steps": 2,
}
TIMINGS = {"tokens_per_second", "mfu", "data_wait_fraction", "checkpoint_stall_seconds"}


def _load(path: Path) -> Any:
    """What a config file returns."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _config(source: str, changes: Mapping[str, Any] | None = None) -> Config:
    raw = _load(ROOT / "configs" / "tiny.py")
    raw.update_from_flattened_dict({**CUT, "data.source": source, **(changes or {})})
    return validation.parse(raw)


def _write_corpus(directory: Path, text: str) -> str:
    directory.mkdir()
    for i in range(40):
        (directory / f"{i:02}.txt").write_text(text * (1 + i % 7) + str(i))
    return str(directory / "*.txt")


def _rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _without_timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def _files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def _checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """A checkpoint's arrays by name, read with nothing of ours."""
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write_corpus(tmp_path_factory.mktemp("corpus") / "text", "the cat sat on the mat. ")


@pytest.fixture(scope="module")
def finished(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    train(_config(corpus), workdir)
    return workdir


@pytest.fixture
def run_of(finished: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copies of that directory, to be tampered with."""

    def copy() -> Path:
        return Path(shutil.copytree(finished, tmp_path / "run"))

    return copy


@pytest.fixture(scope="module")
def resumed(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run in two parts, the second with a trace of step 5."""
    workdir = tmp_path_factory.mktemp("resumed")
    train(_config(corpus, {"training.stop_after_step": 3}), workdir)
    assert [row["step"] for row in _rows(workdir) if "loss" in row] == [1, 2, 3]
    # Rows past the checkpoint, as a crash leaves them: they will be written again.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    train(_config(corpus, {"profile.steps": "5:6"}), workdir)
    return workdir


def test_a_resumed_run_is_the_uninterrupted_one(finished: Path, resumed: Path) -> None:
    expected, actual = _checkpoint(finished, 6), _checkpoint(resumed, 6)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    assert int(actual["['step']"]) == int(actual["['update']"]) == 6
    documents = [
        json.loads((path / "checkpoints/6/document/metadata").read_text())
        for path in (finished, resumed)
    ]
    assert documents[0]["data"] == documents[1]["data"]
    assert _without_timings(_rows(resumed)) == _without_timings(_rows(finished))


def test_the_record_of_a_run(finished: Path, corpus: str) -> None:
    rows = _rows(finished)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in steps] == [256 * step for step in range(1, 7)]
    assert [row["sequence_length"] for row in steps] == [16, 16, 32, 32, 16, 16]
    for row in steps:
        assert row.keys() >= {
            *("loss", "learning_rate", "grad_norm", "tokens_per_second", "packing_efficiency"),
            *("max_violation", "dropped_tokens", "mfu"),
        }
        assert row["tokens_per_second"] > 0 and row["mfu"] > 0 and row["grad_norm"] > 0
        assert 0.5 < row["packing_efficiency"] <= 1
        assert row["dropped_tokens"] == row["skipped_updates"] == 0
    assert steps[0]["learning_rate"] == pytest.approx(0.01)
    assert steps[1]["learning_rate"] == pytest.approx(0.02)
    assert steps[5]["learning_rate"] == pytest.approx(_config(corpus).optimizer.final_lr)
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]

    assert steps[0]["loss"] == pytest.approx(math.log(264), abs=0.1)
    assert steps[5]["loss"] < steps[0]["loss"] - 1
    assert rows[-1]["eval_loss"] < steps[0]["loss"] - 1

    written = json.loads((finished / "config.json").read_text())
    assert written["training"]["num_steps"] == 6 and written["data"]["source"] == corpus
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["4", "6"]


def test_the_trace_names_the_parts_of_the_model(resumed: Path) -> None:
    traces = list((resumed / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    content = traces[0].read_bytes()
    for scope in ("attention", "moe", "router", "dispatch", "loss", "optimizer"):
        assert re.search(rb"[/(]" + scope.encode() + rb"[/)]", content), scope
    # The same for Perfetto.
    (events,) = (resumed / "profile").rglob("*.trace.json.gz")
    assert b"train" in gzip.decompress(events.read_bytes())


def test_running_again_after_the_end_changes_nothing(
    run_of: Callable[[], Path], corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = run_of()
    before = _files(workdir)
    train(_config(corpus), workdir)
    after = _files(workdir)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("tensorboard") for name in after.keys() - before.keys())
    assert "resuming    from step 6" in capsys.readouterr().out


def test_another_model_is_refused(run_of: Callable[[], Path], corpus: str) -> None:
    workdir = run_of()
    before = _files(workdir)
    changes = {"model.hidden_size": 32, "model.moe.num_experts": 16}
    with pytest.raises(UserError) as error:
        train(_config(corpus, changes), workdir)
    assert "config.model.hidden_size: 16 -> 32" in str(error.value)
    assert "config.model.moe.num_experts: 8 -> 16" in str(error.value)
    assert _files(workdir) == before


def test_another_corpus_is_refused(run_of: Callable[[], Path], tmp_path: Path) -> None:
    workdir = run_of()
    before = _files(workdir)
    other = _write_corpus(tmp_path / "other", "the dog lay on the rug. ")
    with pytest.raises(UserError, match="was trained on another corpus"):
        train(_config(other), workdir)
    assert _files(workdir) == before


def test_parameters_that_the_checkpoint_lacks_are_refused(
    run_of: Callable[[], Path], corpus: str
) -> None:
    workdir = run_of()
    before = _files(workdir)
    with pytest.raises(UserError, match="ema/embedding/weight is missing in the checkpoint"):
        train(_config(corpus, {"optimizer.ema_decay": 0.9}), workdir)
    assert _files(workdir) == before


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_work_directory_that_cannot_be_made_is_refused(
    tmp_path: Path, corpus: str, place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the work directory .*; give another"):
        train(_config(corpus), tmp_path / place)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_builds(path: Path) -> None:
    """Its state and a step of each stage, in shapes alone, on as many devices as it names."""
    config = validation.parse(_load(path))
    known = math.prod(
        size for axis in sharding.DEVICE_ORDER if (size := getattr(config.mesh, axis)) != -1
    )
    sizes = sharding.mesh_sizes(config.mesh, math.lcm(known, config.mesh.num_cpu_devices))
    validation.check_mesh(config, sizes)
    mesh = AbstractMesh(
        tuple(sizes[axis] for axis in sharding.DEVICE_ORDER),
        sharding.DEVICE_ORDER,
        axis_types=(AxisType.Explicit,) * len(sizes),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(config))
        for stage in config.data.stages:
            step = make_train_step(at_stage(config, stage))
            split = NamedSharding(mesh, jax.P(None, sharding.BATCH_AXES, None))
            batch = {
                name: jax.ShapeDtypeStruct(batch_shape(config, stage), dtype, sharding=split)
                for name, dtype in (
                    *((n, jnp.int32) for n in ("tokens", "targets", "segment_ids", "positions")),
                    ("loss_weights", jnp.float32),
                )
            }
            new, metrics = jax.eval_shape(step, state, batch, scheduled(config, 0))
            jax.tree.map(
                lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(), new, state
            )
            assert metrics["loss"].shape == ()


def test_the_command(corpus: str, tmp_path: Path, finished: Path) -> None:
    """In a process of its own, with the same cuts as flags; two steps, then a word of text."""
    changes = {
        **CUT,
        "data.source": corpus,
        "training.stop_after_step": 2,
        "training.sample_tokens": 4,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moe_jax.main", "--config=configs/tiny.py"),
            f"--workdir={tmp_path / 'run'}",
            *(f"--config.{name}={value}" for name, value in changes.items()),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for pattern in (
        r"platform: cpu, 8 emulated devices",
        r"devices     8 x cpu; mesh fsdp 2, expert 4",
        r"peak        \S+ TFLOP/s \(.* measured, float32 product\)",
        r"data        .*: 40 documents",
        r"batch       256 tokens a step, 6 steps, \S+ epochs",
        r"parameters  \S+ in total, \S+ per token",
        r"stage 1     16 rows of 16 tokens, compiled in .*, \S+ [KM]iB per device",
        r"step      1  loss 5\.\d{4}  .* tokens/s  MFU .*%  .* left",
        r"step      2  loss ",
        r"step      2  held-out loss ",
        r"written     .*run: checkpoints, metrics.jsonl, tensorboard, config.json",
        r"stopped     the same command without stop_after_step goes on from here",
        r"sample      def ",
    ):
        assert re.search(rf"^{pattern}", done.stdout, re.MULTILINE), (pattern, done.stdout)
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr
    # The same numbers as in the tests' own process.
    for row, expected in zip(_rows(tmp_path / "run")[:2], _rows(finished), strict=False):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_the_command_answers_a_mistake_in_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moe_jax.main", "--config=configs/tiny.py"),
            *(f"--workdir={tmp_path}", f"--config.data.source={tmp_path}/none/*.txt"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: config.data.source='{tmp_path}/none/*.txt' matches no file; give 'stdlib', "
        "a glob of files or a folder\n"
    )

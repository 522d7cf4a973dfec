"""Checkpoints: exact, on any mesh, whole or not there, and unharmed by what is refused."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import sharding
from moe_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    UserError,
)
from moe_jax.fields import RunError
from moe_jax.sharding import P
from moe_jax.training.checkpoint import Checkpoints, check_writable, kept
from moe_jax.training.step import init_state

ROOT = Path(moe_jax.__path__[0]).parent
EIGHT = MeshConfig(fsdp=2, expert_outer=2, expert=2)
ONE = MeshConfig(fsdp=1)
FOUR = MeshConfig(data=2, fsdp=1, expert=2)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    opened = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2))
    yield opened
    opened.close()


def _tree(step: int, size: int = 6) -> dict[str, Any]:
    return {
        "parameters": {"norm": {"scale": jnp.arange(float(size)) + step}},
        "step": jnp.int32(step),
    }


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _state_on(config: MeshConfig) -> tuple[Any, Any]:
    """A state like that of a model on this mesh, and its shapes with shardings."""
    mesh = sharding.make_mesh(
        config, jax.devices()[: config.data * config.fsdp * config.expert_outer * config.expert]
    )
    model = ModelConfig(
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        attention=AttentionConfig(kv_lora_rank=8),
        moe=MoEConfig(num_experts=8, intermediate_size=8),
    )
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_state(Config(model=model)))
    layout = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=jax.NamedSharding(mesh, x.sharding.spec if x.sharding else P()),
        ),
        shapes,
    )
    rng = np.random.default_rng(0)
    values = jax.tree.map(
        lambda x: rng.integers(-(2**30), 2**30, x.shape).astype(x.dtype) / x.dtype.type(3), shapes
    )
    values = jax.tree.map(lambda v, x: np.asarray(v, x.dtype), values, shapes)
    return jax.tree.map(lambda v, x: jax.device_put(v, x.sharding), values, layout), layout


def test_exact_on_any_mesh(tmp_path: Path) -> None:
    state, _ = _state_on(EIGHT)
    expected = jax.device_get(state)
    splits = set()
    for number, config in enumerate((ONE, FOUR, EIGHT)):
        opened = Checkpoints(tmp_path / str(number), CheckpointConfig(keep=1))
        opened.save(3, state, {"data": {"step": 3}})
        opened.wait()
        assert opened.document(3) == {"data": {"step": 3}}
        _, layout = _state_on(config)
        state = opened.restore(3, layout)  # saved from this mesh in the next round
        opened.close()
        _assert_equal(jax.device_get(state), expected)
        jax.tree.map(lambda x, wanted: _assert_form(x, wanted), state, layout)
        splits.add(
            state["parameters"]["moe_blocks"]["moe"]["gate"].sharding.shard_shape((1, 8, 16, 8))
        )
    # The test has teeth: the three meshes split the experts in three ways.
    assert splits == {(1, 8, 16, 8), (1, 4, 16, 8), (1, 2, 8, 8)}


def _assert_form(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> None:
    assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype)
    assert x.sharding == wanted.sharding


def test_names_are_plain() -> None:
    leaves = jax.tree_util.tree_flatten_with_path(_state_on(ONE)[1])[0]
    assert all(isinstance(key, jax.tree_util.DictKey) for path, _ in leaves for key in path)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    assert {
        "parameters/moe_blocks/moe/gate",
        "parameters/moe_blocks/moe/router/weight",
        "parameters/dense_blocks/attention/kv_norm/scale",
        "parameters/embedding/weight",
        "router_bias/moe_blocks/moe/router/bias",
        "optimizer/mu/moe_blocks/moe/gate",
        "optimizer/nu/head/weight",
        "step",
        "update",
    } <= names
    assert all(re.fullmatch(r"[a-z_]+(/[a-z_]+)*", name) for name in names)


def test_the_state_may_be_donated_at_once(checkpoints: Checkpoints) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: -2 * x - 1, tree), donate_argnums=0)
    state = {f"x{i}": jnp.arange(2.0**19) + i for i in range(16)}
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    layout = _abstract(state)
    step.lower(state).compile()  # so that it runs while the checkpoint is being written
    checkpoints.save(1, state, {})
    donated = state
    for _ in range(20):
        state = step(state)
    jax.block_until_ready(state)
    # The test has teeth: a buffer that the writer still held would have been kept, not donated.
    assert all(x.is_deleted() for x in donated.values())
    checkpoints.wait()
    _assert_equal(checkpoints.restore(1, layout), expected)


def test_a_save_compiles_nothing(tmp_path: Path) -> None:
    """Each program takes a while, and training waits."""
    _, layout = _state_on(FOUR)  # with replicas, which Orbax would have write a part each
    # Shapes that no other test has, else their programs might be there already.
    zeros = [np.zeros((2, *x.shape), x.dtype) for x in jax.tree.leaves(layout)]
    mesh = jax.tree.leaves(layout)[0].sharding.mesh
    state = {f"x{i}": jax.device_put(x, jax.NamedSharding(mesh, P())) for i, x in enumerate(zeros)}
    opened, compiled = Checkpoints(tmp_path, CheckpointConfig(keep=1)), []

    def listen(event: str, _: float, **__: Any) -> None:
        compiled.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        opened.save(1, state, {})
        opened.wait()
        assert compiled == []
        jax.jit(lambda x: x + 17)(zeros[0])
        assert compiled != []  # the test has teeth
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        opened.close()


def test_a_clock_that_jumps_harms_no_save(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, itertools.cycle([0, 3, -1, 1, -3])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps) * 86400)
    for step in (1, 2, 3):
        checkpoints.save(step, _tree(step), {})
    assert checkpoints.latest() == 3
    _assert_equal(checkpoints.restore(3, _abstract(_tree(0))), _tree(3))


def test_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    for step in (2, 4, 6, 8):
        checkpoints.save(step, _tree(step), {"step": step})
    checkpoints.wait()
    assert checkpoints.latest() == 8
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["6", "8"]
    for step in (6, 8):
        assert checkpoints.document(step) == {"step": step}
        _assert_equal(checkpoints.restore(step, _abstract(_tree(0))), _tree(step))


def test_a_half_written_checkpoint_is_not_there(tmp_path: Path) -> None:
    opened = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    opened.save(1, _tree(1), {})
    opened.save(2, _tree(2), {})
    opened.close()
    # The name under which a checkpoint is written, before the one rename that makes it visible.
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "2.orbax-checkpoint-tmp" / "state" / "manifest.ocdbt").unlink()
    opened = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    assert opened.latest() == 1
    _assert_equal(opened.restore(1, _abstract(_tree(0))), _tree(1))
    # What is left of it is in nobody's way.
    opened.save(2, _tree(5), {})
    opened.wait()
    assert opened.latest() == 2
    _assert_equal(opened.restore(2, _abstract(_tree(0))), _tree(5))
    opened.close()


KILLED = """
import os, sys
from pathlib import Path
import jax.numpy as jnp
from moe_jax.config import CheckpointConfig
from moe_jax.training.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointConfig(keep=1))
state = lambda value: {f"x{i}": jnp.full((2**20,), value) for i in range(32)}
checkpoints.save(1, state(1.0), {"step": 1})
checkpoints.wait()
checkpoints.save(2, state(2.0), {"step": 2})
os._exit(9)
"""


def test_a_process_killed_while_it_saves_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, timeout=120
    )
    assert done.returncode == 9
    opened = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    step = opened.latest()
    assert step in (1, 2)  # 2 if the disk was quick
    layout = {f"x{i}": jax.ShapeDtypeStruct((2**20,), jnp.float32) for i in range(32)}
    for array in opened.restore(step, layout).values():
        np.testing.assert_array_equal(array, float(step))
    assert opened.document(step) == {"step": step}
    opened.close()


def _damages() -> dict[str, Callable[[Path], object]]:
    """What can befall the newer of two checkpoints, 1 and 2, by what is then said of it."""

    def largest(path: Path) -> Path:
        return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)

    def flip(path: Path) -> None:
        data = bytearray(largest(path / "state").read_bytes())
        data[len(data) // 2] ^= 1
        largest(path / "state").write_bytes(data)

    def truncate(path: Path) -> None:
        os.truncate(largest(path / "state"), 100)

    def swap(path: Path) -> None:
        shutil.rmtree(path / "state")
        shutil.copytree(path.parent / "1" / "state", path / "state")

    def swap_all(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(path.parent / "1", path)

    return {
        "has other content than was written": flip,
        "has 100 bytes, not": truncate,
        "document/metadata is missing": lambda path: (path / "document/metadata").unlink(),
        "is not in the manifest": lambda path: (path / "state" / "more").touch(),
        "its manifest is missing": lambda path: (path / "manifest.0-of-1.json").unlink(),
        "is no manifest": lambda path: os.truncate(path / "manifest.0-of-1.json", 100),
        "state/manifest.ocdbt has other content": swap,
        "is that of checkpoint 1": swap_all,
    }


@pytest.mark.parametrize("sentence", _damages())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, sentence: str
) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2), said.append)
    for step in (1, 2):
        checkpoints.save(step, _tree(step), {})
        assert checkpoints.latest() == step and not said
    _damages()[sentence](tmp_path / "2")
    assert checkpoints.latest() == 1
    assert len(said) == 1 and "checkpoint 2 is not whole and set aside" in said[0]
    assert sentence in said[0], said
    assert checkpoints.latest() == 1 and len(said) == 1  # said once
    _assert_equal(checkpoints.restore(1, _abstract(_tree(0))), _tree(1))
    # Its step can be saved again.
    checkpoints.save(2, _tree(5), {})
    assert checkpoints.latest() == 2
    _damages()[sentence](tmp_path / "2")
    (tmp_path / "1" / "document" / "metadata").unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        checkpoints.latest()
    checkpoints.close()


def test_which_are_kept() -> None:
    losses = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 1.0, 60: 5.0}
    assert kept(losses, CheckpointConfig(keep=2)) == {50, 60}
    assert kept(losses, CheckpointConfig(keep=1, keep_every_steps=20)) == {20, 40, 60}
    # Of equal losses, the later one's.
    assert kept(losses, CheckpointConfig(keep=1, keep_best=1)) == {50, 60}
    assert kept(losses, CheckpointConfig(keep=1, keep_best=3)) == {20, 40, 50, 60}
    assert kept({}, CheckpointConfig()) == set()


def test_the_best_and_every_nth_stay(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, keep_every_steps=3, keep_best=1)
    checkpoints = Checkpoints(tmp_path, config)
    for step, loss in enumerate([5.0, 4.0, 9.0, 8.0, None, 7.0, None], start=1):
        checkpoints.save(step, _tree(step), {"eval_loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3, 6, 7]
    assert checkpoints.latest(before=7) == 6 and checkpoints.latest(before=2) is None
    checkpoints.close()


def test_a_save_that_fails_is_told_and_harms_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    config = CheckpointConfig(keep=3, max_failed_saves=2)
    checkpoints = Checkpoints(tmp_path, config, said.append)
    checkpoints.save(1, _tree(1), {})
    (tmp_path / "2").write_text("in the way")
    (tmp_path / "4").write_text("in the way")
    checkpoints.save(2, _tree(2), {})
    checkpoints.save(3, _tree(3), {})
    checkpoints.save(4, _tree(4), {})
    checkpoints.wait()
    assert [text[:40] for text in said] == [
        "not saved   checkpoint 2 could not be wr",
        "not saved   checkpoint 4 could not be wr",
    ]
    assert "training goes on, 1 more may fail" in said[0]
    (tmp_path / "5").write_text("in the way")
    with pytest.raises(RunError, match="checkpoint 5 could not be written .* the 2 last ones"):
        checkpoints.save(5, _tree(5), {})
        checkpoints.wait()
    for step in (2, 4, 5):
        (tmp_path / str(step)).unlink()
    assert checkpoints.latest() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    checkpoints.close()


def test_what_else_failed_in_a_save_fails_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=3), said.append)
    errors = [OSError("first"), OSError("second"), OSError("third")]
    real = checkpoints._checkpointer.wait_until_finished
    # Orbax raises what went wrong in parts of a save one by one.
    monkeypatch.setattr(
        checkpoints._checkpointer,
        "wait_until_finished",
        lambda: (_ for _ in ()).throw(errors.pop(0)) if errors else real(),
    )
    checkpoints.save(1, _tree(1), {})
    checkpoints.save(2, _tree(2), {})
    assert checkpoints.latest() == 2 and not errors
    (tmp_path / "3").write_text("in the way")
    checkpoints.save(3, _tree(3), {})
    errors += [OSError("fourth"), OSError("fifth")]
    checkpoints.close()  # as at the end of a run that something else ended
    assert [text.split(" could")[0] for text in said] == [
        "not saved   checkpoint 1",
        "not saved   checkpoint 3",
    ]
    assert "(first)" in said[0]


def test_what_does_not_fit_is_refused_and_listed(checkpoints: Checkpoints) -> None:
    stored = {
        "parameters": {"kept": jnp.ones(3), "gone": jnp.ones(2), "wider": jnp.ones((4, 2))},
        "ema": {"half": jnp.ones(2, jnp.bfloat16)},
        "step": jnp.int32(1),
    }
    wanted = {
        "parameters": {"kept": jnp.ones(3), "wider": jnp.ones((4, 3)), "new": jnp.ones(())},
        "ema": {"half": jnp.ones(2)},
        "step": jnp.int32(1),
    }
    checkpoints.save(1, stored, {})
    checkpoints.wait()
    before = _files(checkpoints.directory)
    with pytest.raises(UserError) as error:
        checkpoints.restore(1, _abstract(wanted))
    assert str(error.value) == (
        f"checkpoint 1 in {checkpoints.directory} does not fit this run: "
        "ema/half is bfloat16[2] in the checkpoint and float32[2] in this run; "
        "parameters/gone is float32[2] in the checkpoint and absent in this run; "
        "parameters/new is missing in the checkpoint and float32[] in this run; "
        "parameters/wider is float32[4, 2] in the checkpoint and float32[4, 3] in this run"
    )
    assert _files(checkpoints.directory) == before
    _assert_equal(checkpoints.restore(1, _abstract(stored)), stored)


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("something of the user's")
    with pytest.raises(
        UserError, match=re.escape(f"cannot write to the work directory {tmp_path}")
    ):
        check_writable(tmp_path / place)
    assert (tmp_path / "file").read_text() == "something of the user's"


@pytest.fixture
def own_directory() -> Iterator[Path]:
    """Made by an ordinary user, who this process is meanwhile: root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody
    try:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
    finally:
        os.seteuid(user)


def test_a_read_only_directory_is_refused(own_directory: Path) -> None:
    check_writable(own_directory)
    (own_directory / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied; give another with --workdir"):
        check_writable(own_directory / "locked")


def test_a_writable_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []

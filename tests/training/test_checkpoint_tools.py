"""Checkpoints listed, verified, compared, exported and deleted from outside."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import validation
from moe_jax.config import CheckpointConfig, UserError, default_config
from moe_jax.fields import to_dict
from moe_jax.interop.orbax_files import read_arrays, read_checkpoint
from moe_jax.training import checkpoint_tools
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.lock import locked

ROOT = Path(moe_jax.__path__[0]).parent


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A run with checkpoints 2 and 4, and 6 that was never finished."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=9))
    for step in (2, 4, 6):
        state = {
            "parameters": {"scale": jnp.arange(4.0) * (1 + step // 4), "same": jnp.ones(2)},
            "step": jnp.int32(step),
        }
        raw = default_config()
        raw.update_from_flattened_dict({"training.num_steps": 100 * step})
        config = to_dict(validation.parse(raw))
        checkpoints.save(step, state, {"config": config, "eval_loss": None if step == 2 else 1.5})
    checkpoints.close()
    (tmp_path / "checkpoints" / "6" / "manifest.0-of-1.json").unlink()
    return tmp_path


def test_listed_and_verified(workdir: Path) -> None:
    lines = list(checkpoint_tools.listing(workdir, verify=False))
    assert [line.split()[0] for line in lines] == ["2", "4", "6"]
    assert lines[0].endswith("held-out loss      -  finished")
    assert lines[1].endswith("held-out loss 1.5000  finished")
    assert lines[2].endswith("never finished")
    os.truncate(workdir / "checkpoints" / "2" / "document" / "metadata", 5)
    first, fault, second, _ = checkpoint_tools.listing(workdir, verify=True)
    assert first.endswith("damaged") and second.endswith("whole")
    assert fault.strip().startswith("document/metadata has 5 bytes, not ")
    with pytest.raises(UserError, match="is no work directory"):
        list(checkpoint_tools.listing(workdir / "checkpoints", verify=False))


def test_an_empty_list_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (line,) = checkpoint_tools.listing(tmp_path, verify=False)
    assert line == f"{tmp_path} has no checkpoints yet"


def test_compared(workdir: Path) -> None:
    assert list(checkpoint_tools.compare(workdir, "2", "4")) == [
        "config.training.num_steps: 200 -> 400",
        "parameters/scale: 3 of 4 differ by up to 3",
        "step: all differ by up to 2",
        "1 of 3 arrays are equal, bit for bit",
    ]
    with pytest.raises(UserError, match="has no checkpoint 5; there are 2, 4, 6"):
        list(checkpoint_tools.compare(workdir, "2", "5"))
    with pytest.raises(UserError, match="must be two steps"):
        list(checkpoint_tools.compare(workdir, "2"))


def test_weights_are_exported_alone(workdir: Path) -> None:
    (line,) = checkpoint_tools.export(workdir, "4", str(workdir / "out"))
    assert line == f"written     {workdir}/out: 6 weights of checkpoint 4"
    _, weights = read_checkpoint(workdir / "out")
    scale = weights["parameters"]["scale"].read((slice(0, 4),))
    np.testing.assert_array_equal(scale, np.arange(4) * 2)
    assert set(read_arrays(workdir / "out")) == {"parameters"}
    with pytest.raises(UserError, match="exists; give another"):
        list(checkpoint_tools.export(workdir, "4", str(workdir / "out")))


def test_a_damaged_checkpoint_is_not_exported(workdir: Path) -> None:
    path = workdir / "checkpoints" / "4" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes().replace(b"scale", b"Scale"))
    with pytest.raises(UserError, match="not whole: state/_METADATA has other content"):
        list(checkpoint_tools.export(workdir, "4", str(workdir / "out")))


def test_deleted_but_never_the_newest_whole_one_or_under_a_run(workdir: Path) -> None:
    with pytest.raises(UserError, match="--delete names no step"):
        list(checkpoint_tools.delete(workdir, []))
    with pytest.raises(UserError, match="checkpoint 4 is the newest that is whole"):
        list(checkpoint_tools.delete(workdir, ["2", "4"]))
    with locked(workdir), pytest.raises(UserError, match="another run writes to"):
        list(checkpoint_tools.delete(workdir, ["2"]))
    assert len(list(checkpoint_tools.listing(workdir, verify=False))) == 3
    list(checkpoint_tools.delete(workdir, ["2", "6"]))
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]


def test_the_command_does_one_thing_at_a_time(workdir: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "moe_jax.checkpoints", workdir, "--verify", "--delete=2"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    expected = "error: --verify and --delete are two things to do; ask for one at a time\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", expected)
    assert (workdir / "checkpoints" / "2").exists()

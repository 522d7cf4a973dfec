"""Checkpoints, and what processes settle, between two real ones."""

from pathlib import Path

from processes_of_a_run import run_joined

ONE_OF_TWO = """
import os, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from moe_jax import platform
from moe_jax.config import CheckpointConfig, MeshConfig, UserError
from moe_jax.training import processes
from moe_jax.training.checkpoint import Checkpoints

address, number, folder = sys.argv[1], int(sys.argv[3]), Path(sys.argv[4])
platform.start(MeshConfig(num_cpu_devices=4), address, 2, number)
mesh = jax.make_mesh((4,), ("data",))

def tree(value):
    values = np.arange(8.0, dtype=np.float32) + value
    split = NamedSharding(mesh, P("data"))
    return {"x": jax.make_array_from_callback((8,), split, lambda index: values[index])}

assert processes.largest(number) == 1
assert processes.gathered("word" * number) == ["", "word"]

def fails_on_one():
    if number == 1:
        raise UserError("only here")

try:
    processes.all_or_none(fails_on_one)
except UserError as error:
    assert str(error) == "only here"
else:
    raise AssertionError

said = []
checkpoints = Checkpoints(folder, CheckpointConfig(keep=2), said.append)
for step in (1, 2, 3):
    checkpoints.save(step, tree(step), {"step": step})
assert checkpoints.latest() == 3
if number == 0:
    # The oldest goes as soon as both parts of the newest are there, or with the next one.
    assert {"2", "3"} <= {p.name for p in folder.iterdir()} <= {"1", "2", "3"}
    assert sorted(p.name for p in (folder / "3").glob("manifest*")) == [
        "manifest.0-of-2.json", "manifest.1-of-2.json"
    ]
    os.truncate(max((folder / "3").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()), 10)
processes.largest(0)
assert checkpoints.latest() == 2 and "checkpoint 3 is not whole" in said[0], said
layout = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0)
)
restored = checkpoints.restore(2, layout)["x"]
for mine in restored.addressable_shards:
    np.testing.assert_array_equal(mine.data, np.arange(8.0)[mine.index] + 2)
checkpoints.save(3, tree(5), {"step": 3})
assert checkpoints.latest() == 3 and checkpoints.document(3) == {"step": 3}
checkpoints.close()
"""


def test_two_processes_save_verify_and_restore(tmp_path: Path) -> None:
    run_joined(ONE_OF_TWO, 2, tmp_path / "saved")

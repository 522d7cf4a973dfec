"""The global batches of real processes, byte for byte those of one."""

import contextlib
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from processes_of_a_run import run_joined

from moe_jax.config import Config, DataConfig, Source, Stage, TrainingConfig
from moe_jax.data.corpus import split_holdout
from moe_jax.data.loader import train_batches
from moe_jax.data.sources import open_corpus

STEPS, SAVED = 9, (2, 4)  # states are merged over processes inside a stage and at its border
ONE_OF_MANY = """
import contextlib, itertools, pickle, sys
from pathlib import Path
import jax
from moe_jax import platform, sharding
from moe_jax.config import MeshConfig
from moe_jax.data.corpus import split_holdout
from moe_jax.data.loader import train_batches
from moe_jax.data.sources import open_corpus
from moe_jax.training import resume
from moe_jax.training.loop import global_batch

address, count, number, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
mesh = MeshConfig(num_cpu_devices=4, fsdp=2, expert=2)
platform.start(mesh, address, count, number)
mesh = sharding.make_mesh(mesh)
share = sharding.process_share(mesh)
config, steps, saved = pickle.loads((folder / "config").read_bytes())
corpus = open_corpus(config.data)
groups, _ = split_holdout(corpus.parts, config.data.holdout_every)
found, state = [], None
for start, stop in itertools.pairwise((0, *saved, steps)):
    with contextlib.closing(train_batches(config, corpus, groups, share, state)) as batches:
        for batch in itertools.islice(batches, stop - start):
            arrays = global_batch(batch, mesh, share)
            found.append({
                name: (x.shape, [(s.index, jax.device_get(s.data)) for s in x.addressable_shards])
                for name, x in arrays.items()
            })
        state = resume.describe(config, corpus.fingerprint, batches.get_state())["data"]
assert len(state["streams"]) == config.data.num_streams
(folder / f"found{number}").write_bytes(pickle.dumps(found))
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_feed_the_bytes_of_one(tmp_path: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        for i, size in enumerate(random.integers(5, 120, 20)):
            text = "".join(map(chr, random.integers(97, 123, size)))
            (tmp_path / f"{name}{i:02}.txt").write_text(text)
    sources = tuple(Source(str(tmp_path / f"{name}*.txt"), 0.5) for name in ("a", "b"))
    stages = (Stage(32, 4 * 768), Stage(48, tokens_per_step=1152, weights=(0.2, 0.8)))
    config = Config(
        data=DataConfig(source=sources, stages=stages, num_streams=4, packing_bins=5),
        training=TrainingConfig(tokens_per_step=768, num_steps=STEPS, micro_batches=2),
    )
    (tmp_path / "config").write_bytes(pickle.dumps((config, STEPS, SAVED)))
    run_joined(ONE_OF_MANY, count, tmp_path)

    corpus = open_corpus(config.data)
    groups, _ = split_holdout(corpus.parts, config.data.holdout_every)
    with contextlib.closing(train_batches(config, corpus, groups, (0, 1, 1))) as batches:
        whole = list(itertools.islice(batches, STEPS))
    parts = [pickle.loads((tmp_path / f"found{i}").read_bytes()) for i in range(count)]
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            seen = np.zeros(array.shape, bool)
            for part in parts:
                shape, shards = part[step][name]
                assert shape == array.shape
                for index, data in shards:
                    assert (data.dtype, data.tobytes()) == (array.dtype, array[index].tobytes())
                    seen[index] = True
            assert seen.all()

"""What every test runs on: eight emulated CPU devices, and a cache of compiled programs.

The cache is set through the environment, so that the programs that tests start use it as well.
"""

import os
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_jax" / "tests"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Compiling is most of the suite's time: store every program, however small or quick to compile.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402  JAX reads the environment when it is imported
import pytest  # noqa: E402

from moe_jax.platform import XLA_CPU_FLAGS, missing_flags  # noqa: E402

# As the command has them, whose programs are then found in the cache: flags are part of the key.
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{missing_flags(XLA_CPU_FLAGS, _GIVEN)} {_GIVEN}".strip()
jax.config.update("jax_num_cpu_devices", 8)

# Linux lets a process have 65,530 mappings. A train step compiled for eight CPU devices takes some
# 2,500 of them, and at the limit XLA ends in a segmentation fault.
_MAPPINGS = Path("/proc/self/maps")
_MANY_MAPPINGS = 30_000


@pytest.fixture(autouse=True)
def few_mappings():
    """Compiled programs are let go before there are too many; those on disk come back quickly."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()

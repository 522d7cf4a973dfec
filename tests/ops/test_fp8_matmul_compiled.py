"""FP8 products compiled for devices that are not here: instructions that multiply FP8.

What is inside a kernel only the compilers' dumps tell, which they are asked for as they start: this
file is also the program that compiles (`pytest -m aot`).
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

EXPERTS, TILES, SIZE = 2, 4, 256
# A last block of the sum that is half one, and columns that end within a block.
DIM_A, DIM_B = 576, 320


def compile_products(topology: str) -> None:
    """Both kernels in a region of two devices."""
    from moe_jax.planning import topologies

    topologies.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from moe_jax.ops import fp8_matmul_gpu, fp8_matmul_tpu

    gpu = topology.startswith("h100")
    module, size = (fp8_matmul_gpu, 128) if gpu else (fp8_matmul_tpu, SIZE)
    slots = TILES * size
    devices = np.array(topologies.devices(topology)[:2])
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Explicit,))

    def region(x, x_scales, w, w_scales, xt, xt_scales, yt, yt_scales, expert_of_tile, used):
        where = expert_of_tile, used[0]
        y = module.gmm_fp8(x, x_scales, w, w_scales, *where)
        return y, module.tgmm_fp8(xt, xt_scales, yt, yt_scales, *where, EXPERTS)

    def scales(rows: int, columns: int) -> tuple[int, int]:
        return rows, -(-columns // 128)

    def shape(axis: int, dims: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        spec = P(*[None] * axis, "data")
        dims = *dims[:axis], 2 * dims[axis], *dims[axis + 1 :]
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, spec))

    fp8 = jnp.float8_e4m3fn
    shapes = (
        shape(0, (slots, DIM_A), fp8),
        shape(0, scales(slots, DIM_A)),
        shape(0, (EXPERTS, DIM_B, DIM_A), fp8),
        shape(0, (EXPERTS, *scales(-(-DIM_B // 128), DIM_A))),
        shape(1, (DIM_A, slots), fp8),
        shape(1, scales(DIM_A, slots)),
        shape(1, (DIM_B, slots), fp8),
        shape(1, scales(DIM_B, slots)),
        shape(0, (TILES,), jnp.int32),
        shape(0, (1,), jnp.int32),
    )
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            region, in_specs=tuple(s.sharding.spec for s in shapes), out_specs=(P("data"),) * 2
        )
        text = jax.jit(mapped).lower(*shapes).compile().as_text()
    print(text)


def _compiled(topology: str, **variables: str) -> str:
    """The program's text."""
    done = subprocess.run(
        [sys.executable, __file__, topology],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"= \S+ (dot|convolution)\(", done.stdout)
    return done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's plugin for CUDA is not installed (the extra cuda13)",
)
def test_tensor_cores_of_an_h100_multiply_fp8(tmp_path: Path) -> None:
    dump = {f"MOSAIC_GPU_DUMP_{name}": "1" for name in ("PTX", "PTXAS")}
    text = _compiled("h100:1x2", MOSAIC_GPU_DUMP_TO=str(tmp_path), **dump)
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    for kernel in ("matmul_fp8", "matmul_fp8_weights"):
        (program,) = tmp_path.glob(f"{kernel}_[0-9].ptx")
        products = re.findall(r"wgmma\.mma_async\S*", program.read_text())
        # Two pieces of columns, four times 32 of the sum.
        assert products == ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"] * 8
        # The order of pieces is forced on the compiler so that registers suffice.
        assert "0 bytes spill stores" in program.with_suffix(".ptxas").read_text()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_matrix_units_of_a_v7x_multiply_fp8(tmp_path: Path) -> None:
    flags = f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"
    text = _compiled("tpu7x:2x2x1", LIBTPU_INIT_ARGS=flags)
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    for kernel in ("matmul_fp8.", "matmul_fp8_weights."):
        (bundles,) = tmp_path.glob(f"*-{kernel}*[0-9]-final_bundles.txt")
        products = set(re.findall(r"vmatmul\.mubr\S*", bundles.read_text()))
        assert products and all("f8e4m3fn" in product for product in products)
        assert not any("bf16" in product for product in products)


if __name__ == "__main__":
    compile_products(sys.argv[1])

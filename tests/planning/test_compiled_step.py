"""What a compiled step's kernels are counted by."""

import pytest

from moe_jax.planning.compiled import Walk
from moe_jax.planning.compiled_step import fp8_kernels, grouped_kernels

# As XLA writes them: 512 slots in tiles, 4 experts or one, 96 inputs of which the GPU makes 128.
ROWS = "bf16[512,64]{1,0} custom-call(%tiles, %used, %scales, %x, %w, %x_scales)"
WEIGHTS = "f32[4,96,64]{2,1,0} custom-call(%used, %tiles, %xt, %xt_scales, %yt, %yt_scales)"
OPERANDS = {
    "tiles": "s32[4]{0}",
    "used": "s32[1]{0}",
    "scales": "f32[4,1,1]{2,1,0}",
    "x": "f8e4m3fn[512,128]{1,0}",
    "w": "f8e4m3fn[4,64,128]{2,1,0}",
    "x_scales": "f32[1,512]{1,0}",
    "xt": "f8e4m3fn[96,512]{1,0}",
    "xt_scales": "f32[4,96]{1,0}",
    "yt": "f8e4m3fn[64,512]{1,0}",
    "yt_scales": "f32[4,64]{1,0}",
}


@pytest.mark.parametrize(
    ("call", "scope", "operations"),
    [
        (ROWS, "moe/shard_map/dispatch/jvp(jvp())/matmul_fp8/mpmd_map", 512 * 128 * 64),
        (ROWS, "moe/shard_map/dispatch/jvp(jvp(matmul_fp8))/pallas_call", 512 * 128 * 64),
        (ROWS, "attention/shard_map/matmul_fp8/mpmd_map", 2 * 512 * 128 * 64),
        (WEIGHTS, "dispatch/transpose(jvp(matmul_fp8_weights))/pallas_call", 512 * 96 * 64),
        (WEIGHTS, "mlp/shard_map/matmul_fp8_weights/mpmd_map", 2 * 512 * 96 * 64),
    ],
)
def test_products_in_eight_bits(call: str, scope: str, operations: float) -> None:
    """Buffers of experts are half full, other rows are all there."""
    operands = [
        f"  %{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(OPERANDS.items())
    ]
    kernel = f'  ROOT %k = {call}, custom_call_target="any", metadata={{op_name="step/{scope}"}}'
    text = "\n".join(["HloModule m", "", "ENTRY %main () -> s32[] {", *operands, kernel, "}", ""])
    kernels = grouped_kernels(0.5) | fp8_kernels(0.5)
    assert Walk(text, kernels=kernels).counts().operations == operations

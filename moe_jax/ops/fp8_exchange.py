"""Rows that travel to experts, and gradients to them, in eight bits (DeepSeek-V3, section 3.3.3).

A row's numbers and the exponents of its scales are one message of bytes. What comes back is not
narrowed: sums of experts, and gradients of what was sent.

Shapes: S rows, D model dim, n tiles of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.exchange import Round
from moe_jax.ops.fp8 import Quantized
from moe_jax.ops.fp8_recipes import DISPATCHED, DISPATCHED_GRADIENT, Scaling

FRACTION_BITS = 23  # of a float32


def in_eight_bits(round: Round) -> Round:
    """The same round; rows go there in eight bits, as gradients of what comes back do."""
    move = round.move

    def sent(rows_SD, routes, scaling):
        """What arrives, in the dtype of what was sent."""
        packed = pack(scaling.quantize(rows_SD, 1))
        # The name lets a rematerialization policy keep it; it sees no exchange in here.
        arrived = checkpoint_name(move(packed, routes, False), "arrived")
        return scaling.dequantize(unpack(arrived, rows_SD.shape[1], scaling), 1, rows_SD.dtype)

    @jax.custom_vjp
    def there(rows_SD, routes):
        return sent(rows_SD, routes, DISPATCHED)

    there.defvjp(
        lambda rows_SD, routes: (sent(rows_SD, routes, DISPATCHED), routes),
        lambda routes, d_rows: (move(d_rows, routes, True), None),
    )

    @jax.custom_vjp
    def back(rows_SD, routes):
        return move(rows_SD, routes, True)

    back.defvjp(
        lambda rows_SD, routes: (move(rows_SD, routes, True), routes),
        lambda routes, d_rows: (sent(d_rows, routes, DISPATCHED_GRADIENT), None),
    )

    def either(rows_SD: jax.Array, routes: Any, returns: bool) -> Any:
        return (back if returns else there)(rows_SD, routes)

    return round._replace(move=either)


def pack(x: Quantized) -> jax.Array:
    """[S, D + n] uint8: values, then the exponents of their scales, which are powers of two."""
    values_SD = jax.lax.bitcast_convert_type(x.values, jnp.uint8)
    bits_Sn = jax.lax.bitcast_convert_type(x.scales, jnp.uint32)
    return jnp.concatenate([values_SD, (bits_Sn >> FRACTION_BITS).astype(jnp.uint8)], axis=1)


def unpack(packed: jax.Array, dim: int, scaling: Scaling) -> Quantized:
    """What was packed. Zero bytes are zeros; a scale that was no number is infinite."""
    values_SD, exponents_Sn = jnp.split(packed, [dim], axis=1)
    bits_Sn = exponents_Sn.astype(jnp.uint32) << FRACTION_BITS
    return Quantized(
        jax.lax.bitcast_convert_type(values_SD, scaling.dtype),
        jax.lax.bitcast_convert_type(bits_Sn, jnp.float32),
    )

"""Slow checks that look for a fault: is a step deterministic, and where does a NaN come from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import DebugConfig
from moe_jax.fields import RunError

Tree = Any


def checked(config: DebugConfig, run: Callable, make: Callable[[], Callable]) -> Callable:
    """`run`, a step (state, batch, scheduled) that donates its state, as (number, ...) with checks.

    Args:
      make: gives the same step as it is before `jax.jit`.
    """

    def step(number: int, state: Tree, *inputs: Any) -> tuple[Tree, Any]:
        every = config.determinism_check
        again = None
        if every and number % every == 0:
            again = run(jax.tree.map(jnp.copy, state), *inputs)
        state, metrics = run(state, *inputs)
        if again is not None:
            _compare(number, again, (state, metrics))
        if config.nans and int(metrics["update_skipped"]):
            # The state is as it was, so the same inputs make it again.
            raise RunError(f"step {number} was skipped: {first_nan(make(), state, *inputs)}")
        return state, metrics

    return step


def _compare(number: int, first: Tree, second: Tree) -> None:
    """Raises RunError where two runs of a step differ in a bit."""
    equal = jax.jit(lambda a, b: jax.tree.map(_same_bits, a, b))(first, second)
    differing = [
        jax.tree_util.keystr(path[1:], simple=True, separator="/")
        for path, same in jax.tree_util.tree_flatten_with_path(jax.device_get(equal))[0]
        if not same
    ]
    if differing:
        raise RunError(
            f"step {number}, run twice, gave other bits in {len(differing)} arrays: "
            + ", ".join(differing[:10])
        )


def _same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    bits = f"uint{8 * a.dtype.itemsize}"
    if a.dtype == bool:
        return jnp.all(a == b)
    as_bits = jax.lax.bitcast_convert_type
    return jnp.all(as_bits(a, bits) == as_bits(b, bits))


def first_nan(step: Callable, *inputs: Any) -> str:
    """The first operation of the step that makes a NaN, as JAX finds it, in one line."""
    try:
        with jax.debug_nans(True):
            jax.block_until_ready(jax.jit(step)(*inputs))
    except FloatingPointError as error:
        line = str(error).strip().splitlines()[0]
        return f"{line} {_place(error)}"
    return "no operation makes a NaN; an infinity does"


def _place(error: BaseException | None) -> str:
    """Where in the program the operation stands, from the innermost error."""
    place = ""
    while error:
        trace = error.__traceback__
        while trace:
            file = trace.tb_frame.f_code.co_filename
            if "site-packages" not in file and file != __file__:
                place = f"in {'/'.join(file.split('/')[-2:])}:{trace.tb_lineno}"
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return place

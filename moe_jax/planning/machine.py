"""What the devices at hand can do."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Dense bf16 operations per second of one device, from the makers' data sheets, by the name that
# JAX gives the device.
PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_operations(devices: Sequence[jax.Device], dtype: jnp.dtype) -> tuple[float, str]:
    """Operations per second of all `devices` together, and where the number comes from.

    Devices without a data sheet here, CPUs among them, are measured by a matrix product on one of
    them. Emulated CPU devices share the machine, so the figure of one is that of all.
    """
    kind = devices[0].device_kind
    names = [name for name in PEAK_BF16 if kind.startswith(name)]
    if names:
        per_device = PEAK_BF16[max(names, key=len)]
        return per_device * len(devices), f"{per_device / 1e12:.0f} TFLOP/s bf16 a device"
    measured = _measure(jax.local_devices()[0], dtype)
    machines = len({device.process_index for device in devices})
    count = machines if devices[0].platform == "cpu" else len(devices)
    return measured * count, f"{measured / 1e9:.0f} GFLOP/s measured, {dtype.name} product"


def _measure(device: jax.Device, dtype: jnp.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Operations per second of the best of a few matrix products."""
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)

"""Accelerators: their public peak numbers, and abstract devices to compile for.

A machine is named by its slice (`v5e-16`, `v5p-128`, counted as Google Cloud does: TensorCores for
v4 and v5p, chips for v5e and v6e), by the shape of one (`v5e:4x4`), as GPUs of one node (`a100:4`,
`h100:8`), or as simulated CPU devices (`cpu:8`).
"""

import dataclasses
import importlib.util
import math
import os
import re
from importlib import resources
from typing import Any

import jax

from patchwave_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device. FLOP/s are those of dense products at JAX's default precision.

    For `float32` this is one bfloat16 pass on a TPU, and TF32 on a GPU.
    """

    name: str
    kind: str  # `device_kind` of its devices
    memory_bytes: float
    usable: float  # the share of its memory that a program gets
    memory_bandwidth: float  # bytes a second
    flops: dict[str, float]  # a second, by compute dtype
    link_bandwidth: float  # bytes per second leaving a device, over all links
    source: str


def _tpu(name: str, kind: str, gib: float, gb_s: float, tflops: float, ici_gb_s: float) -> Chip:
    """`ici_gb_s` is the documentation's: both directions."""
    return Chip(
        name=name,
        kind=kind,
        memory_bytes=gib * GIB,
        usable=1.0,
        memory_bandwidth=gb_s * 1e9,
        flops={"float32": tflops * 1e12, "bfloat16": tflops * 1e12},
        link_bandwidth=ici_gb_s / 2 * 1e9,
        source=f"https://cloud.google.com/tpu/docs/{name}",
    )


# JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 32, 1200, 275, 600),
        _tpu("v5e", "TPU v5 lite", 16, 819, 197, 400),
        _tpu("v5p", "TPU v5", 95, 2765, 459, 1200),
        _tpu("v6e", "TPU v6 lite", 32, 1638, 918, 800),
        Chip(
            "a100", "NVIDIA A100-SXM4-80GB", 85e9, 0.75, 2039e9,
            {"float32": 156e12, "bfloat16": 312e12}, 300e9,
            "https://www.nvidia.com/en-us/data-center/a100/ (A100 80GB SXM)",
        ),
        Chip(
            "h100", "NVIDIA H100 80GB HBM3", 85e9, 0.75, 3350e9,
            {"float32": 494e12, "bfloat16": 989e12}, 450e9,
            "https://www.nvidia.com/en-us/data-center/h100/ (H100 SXM, without sparsity)",
        ),
    )
}  # fmt: skip
_FLAT = (1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)
_CUBES = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8),
    (8, 8, 16), (8, 16, 16), (16, 16, 16),
)  # fmt: skip
_KNOWN = "a TPU slice such as v5e-16 or v5e:4x4 (v4, v5e, v5p, v6e), a100:4, h100:8, or cpu:8"


def machine(topology: str) -> tuple[Chip | None, list[Any]]:
    """The chip (None for CPUs) and the devices of a machine; abstract except for CPUs.

    Raises:
      UserError: if there is no such machine, or its compiler is not installed.
    """
    if match := re.fullmatch(r"cpu:([1-9]\d*)", topology):
        return None, _simulated(int(match[1]))
    if match := re.fullmatch(r"(a100|h100):([1-8])", topology):
        return CHIPS[match[1]], _gpus(CHIPS[match[1]], int(match[2]), topology)
    if match := re.fullmatch(r"(v4|v5e|v5p|v6e)-([1-9]\d*)", topology):
        chips = int(match[2]) / (2 if match[1] in ("v4", "v5p") else 1)
        shapes = _CUBES if match[1] in ("v4", "v5p") else _FLAT
        shape = next((s for s in shapes if math.prod(s) == chips), None)
        if shape is None:
            sizes = (math.prod(s) * (2 if shapes is _CUBES else 1) for s in shapes)
            names = ", ".join(f"{match[1]}-{size}" for size in sizes)
            raise UserError(f"--topology={topology} is not a slice; there are {names}")
        return CHIPS[match[1]], _tpus(CHIPS[match[1]], "x".join(map(str, shape)), topology)
    if match := re.fullmatch(r"(v4|v5e|v5p|v6e):([\dx]+)", topology):
        return CHIPS[match[1]], _tpus(CHIPS[match[1]], match[2], topology)
    raise UserError(f"--topology={topology} is unknown; give {_KNOWN}")


def usable_bytes(device: Any) -> float | None:
    """Memory available to a program on a device, real or abstract; None if unknown."""
    try:
        stats = device.memory_stats()
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # an abstract device has none
        stats = None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = next((c for c in CHIPS.values() if c.kind == device.device_kind), None)
    return chip.memory_bytes * chip.usable if chip else None


def _simulated(count: int) -> list[Any]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX runs already
        if len(jax.devices("cpu")) < count:
            raise UserError(f"--topology=cpu:{count}: this process has fewer CPU devices") from None
    return jax.devices("cpu")[:count]


def _tpus(chip: Chip, shape: str, topology: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU's compiler: pip install '.[tpu]'")
    # Only the compiler is used: no other host is contacted, and no real TPU is locked.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    return _topology(f"{chip.name}:{shape}", "tpu", topology, options)


def _gpus(chip: Chip, count: int, topology: str) -> list[Any]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(f"--topology={topology} needs the GPU's compiler: pip install '.[cuda]'")
    jax.devices()  # registers the plugin
    text = (
        resources.files("patchwave_jax").joinpath(f"planning/devices/{chip.name}.txtpb").read_text()
    )
    return _topology("", "cuda", topology, {"target_config": text, "topology": f"1x1x{count}"})


def _topology(name: str, platform: str, topology: str, options: dict[str, Any]) -> list[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise UserError(f"--topology={topology}: {told}; give {_KNOWN}") from error

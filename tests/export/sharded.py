"""Runs the tiny model whole and spread over several CPU devices, and prints how far apart they are.

A program of its own, as the number of devices is fixed when jax starts: `python -m tests.export.sharded none 2`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

CHUNK = 24


def main(quant: str, chips: int) -> dict[str, Any]:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={chips}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    from tests.export.test_xla_topology import tiny_programs
    from transom.export.xla.sharding import CHIPS
    from transom.export.xla.topology import shard

    decode, prefill = tiny_programs(quant, "float32", tokens=(1, CHUNK))
    random = np.random.default_rng(0)

    def fill(shape: jax.ShapeDtypeStruct) -> Any:
        dtype = np.dtype(shape.dtype)
        if "int" in dtype.name:
            low, high = jax.numpy.iinfo(dtype).min, jax.numpy.iinfo(dtype).max
            return random.integers(int(low), int(high) + 1, shape.shape).astype(dtype)
        # Norms are near 1: near 0 they would hide what the layers add.
        return (random.standard_normal(shape.shape) / 16 + (len(shape.shape) == 1)).astype(dtype)

    parameters = {name: fill(shape) for name, shape in prefill.parameters.items()}
    mesh = Mesh(np.array(jax.devices()), (CHIPS,))
    runs, collectives = [], {}
    for spread in (False, True):
        caches: Any = [np.zeros(shape.shape, shape.dtype) for shape in decode.caches]
        outputs, start = [], 0
        programs: dict[str, Any] = {}
        for program in (prefill, decode):
            function, arguments = jax.jit(program.function), None
            if spread:
                function, arguments = shard(program, mesh)
                text = function.lower(*arguments).compile().as_text()
                collectives[program.name] = {
                    kind: text.count(f" {kind}(") for kind in ("all-reduce", "all-gather", "all-to-all")
                }
            programs[program.name] = (function, arguments)
        for count in (CHUNK, CHUNK - 5, *[1] * 6):
            name, tokens = (decode.name, 1) if count == 1 else (prefill.name, CHUNK)
            function, arguments = programs[name]
            given = [
                parameters,
                caches,
                random_tokens(tokens, start),
                np.int32(start),
                np.int32(count),
                np.array([count - 1], np.int32),
            ]
            if arguments is not None:
                given = jax.tree.map(lambda value, shape: jax.device_put(value, shape.sharding), given, list(arguments))
            logits, caches, *_ = function(*given)
            outputs.append(np.asarray(logits))
            start += count
        runs.append(np.stack(outputs))
        if spread:
            spread_caches = sum(
                isinstance(cache.sharding, NamedSharding) and not cache.sharding.is_fully_replicated for cache in caches
            )
    return {
        "difference": float(np.abs(runs[0] - runs[1]).max()),
        "deviation": float(runs[0].std()),
        "spread_caches": spread_caches,
        "caches": len(caches),
        "collectives": collectives,
    }


def random_tokens(tokens: int, seed: int) -> Any:
    """Ids below 512, [1, T]."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, 512, (1, tokens)).astype(np.int32)


if __name__ == "__main__":
    print(json.dumps([main(quant, int(sys.argv[1])) for quant in sys.argv[2:]]))

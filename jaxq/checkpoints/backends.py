"""The ways to store numbers, by the name that `jaxq.save` takes."""

from types import ModuleType

from jaxq.checkpoints import orbax, shards

# Each has write(folder, manifest, arrays, shard_bytes) -> data files,
# read(folder, manifest, places, verify) -> arrays, and check_headers(folder, manifest).
BACKENDS: dict[str, ModuleType] = {"safetensors": shards, "orbax": orbax}

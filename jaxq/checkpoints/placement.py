"""Which device a loaded array goes to."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jaxq.checkpoints import parameter
from jaxq.checkpoints.errors import MismatchError
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.sharding import qtensor_shardings

Places = Mapping[str, Sharding | None]


def from_shardings(
    tree: Any, params: Mapping[str, parameter.Abstract], shardings: Any
) -> dict[str, Sharding | None]:
    """Return the sharding of every stored array, by name.

    Args:
        tree: what is being loaded, with paths for leaves.
        params: the abstract parameter of each path.
        shardings: a prefix of ``tree``: a sharding stands for everything below it. At a
            quantized parameter it is the weight's sharding, see
            `jaxq.sharding.qtensor_shardings`, or a `QTensor` of shardings. None leaves
            the choice to the backend.

    Raises:
        MismatchError: ``shardings`` is no prefix, or does not divide a parameter.
    """

    def stop(x: Any) -> bool:
        return x is None or is_qtensor(x) or isinstance(x, Sharding)

    leaves, treedef = jax.tree.flatten(shardings, is_leaf=stop)
    try:
        below = treedef.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        raise MismatchError(
            f"shardings is no prefix of the tree that is loaded: {error}"
        ) from error
    places: dict[str, Sharding | None] = {}
    for sharding, subtree in zip(leaves, below, strict=True):
        for path in jax.tree.leaves(subtree):
            places.update(of_parameter(path, params[path], sharding))
    return places


def of_parameter(
    path: str, leaf: parameter.Abstract, sharding: Any
) -> dict[str, Sharding | None]:
    """Return the sharding of every array of one parameter, by name.

    Raises:
        MismatchError: it is no sharding, or does not divide the array.
    """
    if isinstance(leaf, QTensor) and isinstance(sharding, NamedSharding):
        sharding = qtensor_shardings(leaf, sharding)
    if isinstance(sharding, QTensor):
        given = dict(parameter.tensors(path, sharding))
    else:
        given = {name: sharding for name, _ in parameter.tensors(path, leaf)}
    places = {}
    for name, tensor in parameter.tensors(path, leaf):
        places[name] = given.get(name)
        _check(name, tensor, places[name])
    return places


def put(
    data: np.ndarray, tensor: jax.ShapeDtypeStruct, sharding: Sharding | None
) -> jax.Array | np.ndarray:
    """Copy the bytes of a tensor to where they belong, one device's part at a time.

    64-bit numbers stay in NumPy unless JAX has them enabled: it would narrow them.

    Args:
        data: uint8, read-only, for instance a view of a file.
        tensor: what the bytes mean.
        sharding: None for the default device.
    """
    dtype = np.dtype(tensor.dtype)
    # A stored truth value other than 0 and 1 would be undefined behaviour.
    data = data != 0 if dtype == np.bool_ else data.view(dtype)
    array = data.reshape(tensor.shape)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return np.array(array)
    if sharding is None:
        return jnp.asarray(np.array(array))
    return jax.make_array_from_callback(
        tensor.shape, sharding, lambda index: np.array(array[index])
    )


def fetch(array: Any) -> np.ndarray:
    """Return an array's numbers on the host, without JAX keeping a second copy."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    # A jax.Array remembers its host copy; this one is forgotten with its wrapper.
    pieces = [shard.data for shard in array.addressable_shards]
    wrapper = jax.make_array_from_single_device_arrays(
        array.shape, array.sharding, pieces
    )
    return np.asarray(wrapper)


def _check(name: str, tensor: jax.ShapeDtypeStruct, sharding: Any) -> None:
    if sharding is None:
        return
    if not isinstance(sharding, Sharding):
        raise MismatchError(
            f"shardings has a {type(sharding).__name__} for {name!r}; give a "
            "jax.sharding.Sharding, such as NamedSharding(mesh, spec), or None"
        )
    try:
        sharding.shard_shape(tensor.shape)
    except ValueError as error:
        raise MismatchError(
            f"{name!r} of shape {tensor.shape} cannot be sharded as {sharding}: {error}"
        ) from error

"""A small convolutional classifier at 4, 3 and 2 bits: rounded, and calibrated."""

import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxq
from benchmarks.report import Table, arguments, publish
from jaxq import Recipe, Rule, awq, chain, gptq, rtn

ABOUT = """\
A convolutional network of 50,000 weights (a stem, two residual blocks, a depthwise and
a pointwise convolution, a dense head) tells ten digits of a 5 × 7 font apart, which are
turned, sheared, scaled, shifted and hidden in noise: 16 × 16 pixels, made here. Every
weight, the stem's and the head's as well, has unsigned codes with zero points in groups
of 64, scales in bfloat16. Calibration sees 512 images and no label; means over draws of
them, on 4,096 other images. KL is KL(float ‖ quantized) per image in nats."""

FONT = """
01110 00100 01110 11111 00010 11111 00110 11111 01110 01110
10001 01100 10001 00010 00110 10000 01000 00001 10001 10001
10011 00100 00001 00100 01010 11110 10000 00010 10001 10001
10101 00100 00010 00010 10010 00001 11110 00100 01110 01111
11001 00100 00100 00001 11111 00001 10001 01000 10001 00001
10001 00100 01000 10001 00010 10001 10001 01000 10001 00010
01110 01110 11111 01110 00010 01110 01110 01000 01110 01100
"""
SIZE, NOISE = 16, 0.2


class Net(nn.Module):
    """Images ``[B, 16, 16, 1]`` to logits ``[B, 10]``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits."""
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="stem")(x))
        for i in range(2):
            y = nn.relu(nn.Conv(32, (3, 3), name=f"block_{i}_a")(x))
            x = nn.relu(x + nn.Conv(32, (3, 3), name=f"block_{i}_b")(y))
        x = nn.Conv(32, (3, 3), strides=2, feature_group_count=32, name="depthwise")(x)
        x = nn.relu(nn.Conv(64, (1, 1), name="pointwise")(x))
        return nn.Dense(10, name="dense")(x.reshape(len(x), -1))


def glyphs() -> np.ndarray:
    """Return the font as ``float32[10, 7, 5]``."""
    rows = [line.split() for line in FONT.split("\n") if line]
    return np.array([[[float(c) for c in g] for g in row] for row in rows]).swapaxes(
        0, 1
    )


@functools.partial(jax.jit, static_argnums=1)
def images(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return random images ``[count, 16, 16, 1]`` and their digits."""
    keys = jax.random.split(key, 6)
    digits = jax.random.randint(keys[0], (count,), 0, 10)
    angle = 0.35 * jax.random.normal(keys[1], (count,))
    zoom = jnp.exp(0.15 * jax.random.normal(keys[2], (count, 2))) * 0.65
    shift = 1.5 * jax.random.normal(keys[3], (count, 2))
    shear = 0.2 * jax.random.normal(keys[4], (count,))
    font = jnp.pad(jnp.asarray(glyphs(), jnp.float32), ((0, 0), (2, 2), (2, 2)))
    grid = jnp.stack(jnp.indices((SIZE, SIZE), jnp.float32), -1) - (SIZE - 1) / 2

    def draw(digit: Any, angle: Any, zoom: Any, shift: Any, shear: Any) -> jax.Array:
        turn = jnp.stack(
            [
                jnp.stack([jnp.cos(angle), jnp.sin(angle) + shear]),
                jnp.stack([-jnp.sin(angle), jnp.cos(angle)]),
            ]
        )
        places = ((grid - shift) @ turn) * zoom + jnp.asarray([5.0, 4.0])
        return jax.scipy.ndimage.map_coordinates(
            font[digit], [places[..., 0], places[..., 1]], 1
        )

    x = jax.vmap(draw)(digits, angle, zoom, shift, shear)
    x = x + NOISE * jax.random.normal(keys[5], x.shape)
    return x[..., None], digits


def train(steps: int) -> Any:
    """Return the parameters after some steps of Adam."""
    params = Net().init(jax.random.key(0), images(jax.random.key(1), 1)[0])
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    def loss(params: Any, x: jax.Array, digits: jax.Array) -> jax.Array:
        logits = Net().apply(params, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, digits))

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        slope = jax.grad(loss)(params, *images(key, 128))
        change, state = optimizer.update(slope, state)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.key(100 + i))
    return params


def recipes(bits: int) -> dict[str, str | Recipe]:
    """Return what is compared at a width."""
    spec = jaxq.QuantSpec(f"uint{bits}", 64, symmetric=False, scale="bfloat16")

    def all_of_it(name: str, method: Any) -> Recipe:
        return Recipe(name, (Rule("*", spec, solver=method),))

    return {
        "rounded to nearest": all_of_it("rtn", rtn()),
        f"`w{bits}a16`: ranges of least error": f"w{bits}a16",
        "AWQ, clipped": all_of_it("awq", chain(awq(), rtn(clip="output"))),
        "GPTQ, defaults": all_of_it("gptq", gptq()),
        f"`w{bits}a16-gptq`": f"w{bits}a16-gptq",
    }


def measure(
    params: Any, recipe: Any, draws: int, x: jax.Array, digits: jax.Array
) -> list[float]:
    """Return KL, logits' relative squared error, accuracy, seconds: means of draws."""
    exact = Net().apply(params, x)
    out = []
    for seed in range(draws):
        batches = [
            (images(jax.random.fold_in(jax.random.key(7 + seed), i), 128)[0],)
            for i in range(4)
        ]
        start = time.perf_counter()
        q = jaxq.quantize_params(params, recipe, Net().apply, batches)
        seconds = time.perf_counter() - start
        y = Net().apply(jaxq.dequantize_params(q), x)
        log, small = jax.nn.log_softmax(exact), jax.nn.log_softmax(y)
        kl = jnp.mean(jnp.sum(jnp.exp(log) * (log - small), -1))
        error = jnp.sum((y - exact) ** 2) / jnp.sum(exact**2)
        right = jnp.mean(jnp.argmax(y, -1) == digits)
        out.append([float(kl), float(error), float(right), seconds])
    return np.mean(out, 0).tolist()


def main() -> None:
    """Train, measure, print, and write."""
    options = arguments("Convolutions at few bits.").parse_args()
    params = train(300 if options.quick else 600)
    x, digits = images(jax.random.key(2), 4096)
    right = float(jnp.mean(jnp.argmax(Net().apply(params, x), -1) == digits))
    print(f"float accuracy {right:.4f}", flush=True)
    tables = []
    for bits in (4, 3, 2):
        rows, first = [], None
        for name, recipe in recipes(bits).items():
            draws = 1 if options.quick else 5
            kl, error, accuracy, seconds = measure(params, recipe, draws, x, digits)
            first = first or kl
            row = [name, f"{kl:.5f}", f"{kl / first:.2f}", f"{error:.5f}"]
            rows.append([*row, f"{100 * accuracy:.2f} %", f"{seconds:.1f}"])
            print(bits, *rows[-1], flush=True)
        columns = ("method", "KL", "to rounding", "error of logits", "accuracy", "s")
        tables.append(Table(f"## {bits} bits", columns, rows))
    note = f"The float network is right on {100 * right:.2f} % of them."
    publish("convolution", f"{ABOUT}\n\n{note}", tables, options)


if __name__ == "__main__":
    main()

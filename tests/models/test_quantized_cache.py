"""Whole models through a cache of codes, against floats that were rounded alike."""

from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.evaluate import evaluate_text
from jaxq.huggingface import load_huggingface
from jaxq.kvcache import CACHES, KVCache, LayerCache, empty_cache, explain_cache
from jaxq.lm import DEMO_FOLDER, load_model
from jaxq.quantize import fake_quant
from pallas_kernels.target import Target
from tests.models.seeded import stored_config, write_seeded

KINDS = [name for name, spec in CACHES.items() if spec is not None]
PROMPT = "The :mod:`json` module can be used to"


@dataclass(frozen=True)
class Rounded(LayerCache):
    """Floats, each token and head rounded as a cache of codes does."""

    # part of the structure: to JAX, classes of the same fields may be the same node
    kind: str = "int8"

    def write(self, keys, values, at):
        spec = CACHES[self.kind]
        keys, values = fake_quant(keys, spec, -1), fake_quant(values, spec, -1)
        kept = LayerCache(self.keys, self.values).write(keys, values, at)
        return Rounded(kept.keys, kept.values, self.kind)


jax.tree_util.register_dataclass(Rounded, ("keys", "values"), ("kind",))


def rounded_cache(config, batch, slots, kind):
    cache = empty_cache(config, batch, slots, jnp.float32)
    layers = tuple(Rounded(layer.keys, layer.values, kind) for layer in cache.layers)
    return KVCache(layers, cache.positions, cache.start, cache.end)


def slowly(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    # windows and query scales; alibi; then caps, alibi in bfloat16, one key head, ...
    [
        "gemma3",
        "bloom",
        *map(slowly, ("gemma2", "falcon_rw", "falcon_7b", "gpt2", "opt", "gpt_neox")),
        *map(slowly, ("mixtral_windowed", "phi3")),
    ],
)
def test_every_family_reads_codes_as_it_reads_rounded_floats(name, tmp_path):
    folder = write_seeded(tmp_path / name, stored_config(name))
    model = load_huggingface(folder, jnp.float32)
    apply = jax.jit(model.module.apply)
    vocab = model.config.vocab_size
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, vocab)
    for kind in KINDS:
        caches = [
            empty_cache(model.config, 2, 16, jnp.float32, kind),
            rounded_cache(model.config, 2, 16, kind),
        ]
        pieces = [[], []]
        for start, stop in ((0, 10), (10, 11), (11, 12)):
            for i, cache in enumerate(caches):
                piece = tokens[:, start:stop]
                logits, caches[i] = apply(model.params, piece, None, cache)
                pieces[i].append(logits)
        codes, floats = (jnp.concatenate(p, axis=1) for p in pieces)
        # the same float32 sums in another order
        np.testing.assert_allclose(codes, floats, rtol=0, atol=2e-4)
        off = float(jnp.abs(floats - apply(model.params, tokens)).max())
        assert off > 1e-3  # rounding is to be seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "bloom", "falcon_rw"])
def test_windows_caps_and_alibi_reach_the_kernel_of_a_chip(name, tmp_path):
    folder = write_seeded(tmp_path / name, stored_config(name))
    model = load_huggingface(folder, jnp.float32)
    apply, config = jax.jit(model.module.apply), model.config
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, config.vocab_size)
    outs = []
    for target in (Target("tpu", "v5e", interpret=True), Target("cpu")):
        cache = empty_cache(config, 2, 16, jnp.float32, "int8", target)
        _, cache = apply(model.params, tokens[:, :11], None, cache)
        logits, _ = apply(model.params, tokens[:, 11:], None, cache)
        attends = {
            choice.kernel for choice in explain_cache(apply, model.params, cache)
        }
        outs.append((np.asarray(logits), attends))
    (got, ours), (want, plain) = outs
    assert (ours, plain) == ({"tpu.decode_attention"}, {"xla.cached_attention"})
    # queries and probabilities are bfloat16 in the kernel
    assert 0 < np.abs(got - want).max() <= 2.0**-6 * np.abs(want).max()


@pytest.fixture(scope="module")
def demo():
    return load_model("demo")


def test_a_cache_of_8_bits_writes_what_floats_write(demo):
    short = demo.generate(PROMPT, 24)
    assert demo.generate(PROMPT, 24, cache="int8") == short
    assert demo.with_cache("int8").generate(PROMPT, 24) == short
    assert len(short) > 20


def test_the_same_cache_is_never_compiled_twice(demo):
    """However it is asked for: traces and compilations are counted."""
    counted = Counter()

    def count(event, seconds, **about):
        counted[event.rsplit("/", 1)[-1]] += 1

    def ask(lm):
        tokens = jnp.arange(8)[None]
        return lm.apply(lm.params, tokens).block_until_ready()

    first = demo.with_cache("int8").generate(PROMPT, 3)
    logits = ask(demo.with_cache("int8"))
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        again = demo.with_cache("int8")
        back = demo.with_cache("int4").with_cache("int8")
        texts = [
            again.generate(PROMPT, 3),
            back.generate(PROMPT, 3),
            demo.generate(PROMPT, 3, cache="int8"),
            demo.with_cache("int4").generate(PROMPT, 3, cache="int8"),
        ]
        np.testing.assert_array_equal(ask(back), logits)
        assert again.with_cache("float").apply is demo.apply
        assert not {k: n for k, n in counted.items() if "compile" in k}
        jax.jit(lambda x: x + 1)(jnp.arange(3))
        assert counted["backend_compile_duration"] > 0  # it counts
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert set(texts) == {first}


def test_what_a_cache_costs_is_measured_through_it(demo):
    text = (DEMO_FOLDER / "eval.txt").read_text()[:6000]
    found = {
        kind: evaluate_text(demo.with_cache(kind), text, demo, window=256, limit=4)
        for kind in ("float", *KINDS)
    }
    kl = {kind: row.kl for kind, row in found.items()}
    assert kl["float"] < 1e-6
    # a step is 16 times as wide, so the divergence is about 256 times as large
    assert 1e-5 < kl["int8"] < 1e-3 < kl["int4"] < 5e-2
    assert 30 < kl["int4"] / kl["int8"] < 500
    assert found["int8"].top1 > 0.98


def test_a_text_at_once_is_the_text_token_by_token(demo):
    lm = demo.with_cache("int4")
    tokens = jnp.asarray(demo.encode(PROMPT))[None, :8]
    whole = lm.apply(lm.params, tokens)
    cache, steps = lm.empty_cache(8), []
    for i in range(8):
        logits, cache = lm.apply(lm.params, tokens[:, i : i + 1], None, cache)
        steps.append(logits)
    got = jnp.concatenate(steps, axis=1)
    # bfloat16: sums in another order round to a neighbour, and so on through 6 layers
    assert float(jnp.abs(got - whole).max()) < 0.05 * float(jnp.abs(whole).max())
    assert cache.lengths.tolist() == [8]


def test_what_attends_and_how_many_bytes_it_holds_can_be_asked(demo):
    told = demo.with_cache("int8").explain_cache(512, batch=2)
    assert [choice.kernel for choice in told] == ["xla.cached_attention"] * 6
    assert told.nbytes == 2 * 6 * 2 * 2 * 512 * (64 + 4)  # keys, values; scales
    assert str(told) == f"layers 0-5 -> xla.cached_attention\n{told.nbytes:,} bytes"
    chip = demo.with_cache("int4").explain_cache(512, target=Target("tpu", "v5e"))
    assert {choice.kernel for choice in chip} == {"tpu.decode_attention"}
    assert demo.explain_cache(512).nbytes == 6 * 2 * 2 * 512 * 64 * 2


def test_names_that_are_no_cache_are_refused(demo):
    for ask in (
        lambda: demo.with_cache("int9"),
        lambda: demo.generate("a", cache="int9"),
    ):
        with pytest.raises(ValueError, match=r"'int9'.*Known: float, int4, int8"):
            ask()

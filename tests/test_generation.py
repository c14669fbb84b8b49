"""Cached, batched generation against one uncached forward pass per token."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.generation import GREEDY, Sampling, generate, stream
from jaxq.huggingface import load_huggingface
from jaxq.lift import quantized
from jaxq.pipeline import dequantize_params, quantize_params
from jaxq.qtensor import QTensor

GOLDEN = Path(__file__).parent / "data" / "golden"
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7], list(range(20, 41))]


@pytest.fixture(scope="module", params=["llama3", "mistral", "qwen3"])
def model(request):
    return load_huggingface(GOLDEN / request.param, jnp.float32)


@pytest.fixture(scope="module")
def llama():
    return load_huggingface(GOLDEN / "llama3", jnp.float32)


def is_q(x):
    return isinstance(x, QTensor)


def run(model, prompts, new, **options):
    return generate(
        model.module.apply, model.params, model.config, prompts, new, **options
    )


def uncached(model, prompt, new):
    """The definition: the likeliest token after all tokens so far, again and again."""
    forward = jax.jit(model.module.apply)
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(prompt)] = prompt
    end = len(prompt) + new
    for place in range(len(prompt), end):
        # What stands after a token cannot change its logits: attention is causal.
        logits = forward(model.params, jnp.asarray(tokens))
        tokens[0, place] = int(jnp.argmax(logits[0, place - 1]))
    return tokens[0, len(prompt) : end].tolist()


def test_greedy_equals_the_uncached_argmax(model):
    assert run(model, PROMPTS[1:2], 12) == [uncached(model, PROMPTS[1], 12)]


def test_a_batch_of_any_lengths_equals_each_alone(model):
    together = run(model, PROMPTS, 12)
    assert together == [run(model, [prompt], 12)[0] for prompt in PROMPTS]
    assert len({tuple(text) for text in together}) > 1


def test_a_quantized_model_takes_the_place_of_a_float_one(llama):
    params = quantize_params(llama.params, "nf4")
    assert any(isinstance(x, QTensor) for x in jax.tree.leaves(params, is_leaf=is_q))
    apply = quantized(llama.module.apply)
    got = generate(apply, params, llama.config, PROMPTS, 8)
    rounded = replace(llama, params=dequantize_params(params))
    # Not "equal": an argmax between near ties may fall either way.
    expected = [uncached(rounded, prompt, 8) for prompt in PROMPTS]
    agree = np.mean([a == b for a, b in zip(got, expected, strict=True)])
    assert agree >= 0.75


def test_tokens_and_lengths_are_no_reason_to_trace_again(llama):
    traces = Counter()

    def apply(params, tokens, positions, cache):
        traces[tokens.shape] += 1
        return llama.module.apply(params, tokens, positions, cache)

    def go(prompts, new, sampling=GREEDY):
        return generate(apply, llama.params, llama.config, prompts, new, sampling)

    go([[1, 2, 3]], 10)
    assert traces == {(1, 16): 1, (1, 1): 1}
    go([[4]], 3)
    go([list(range(16))], 16)
    go([[7, 7]], 5, Sampling(0.7, top_k=3, seed=1))
    go([[7, 7]], 9, Sampling(1.3, top_p=0.5, seed=2))
    assert traces == {(1, 16): 1, (1, 1): 1}
    go([list(range(17))], 3)
    assert traces == {(1, 16): 1, (1, 32): 1, (1, 1): 1}


def test_the_end_token_ends_a_row_and_is_not_returned(llama):
    free = run(llama, PROMPTS, 12)
    end = free[1][4]
    stopped = run(llama, PROMPTS, 12, eos=(end, 63))
    for whole, cut in zip(free, stopped, strict=True):
        stop = next((i for i, t in enumerate(whole) if t in (end, 63)), len(whole))
        assert cut == whole[:stop]


def test_a_stream_stops_once_every_row_has_ended(llama):
    first = run(llama, PROMPTS[:1], 1)[0][0]
    arguments = llama.module.apply, llama.params, llama.config, PROMPTS[:1]
    assert list(stream(*arguments, max_new_tokens=5, eos=(first,))) == []
    assert len(list(stream(*arguments, max_new_tokens=5))) == 5


def test_a_seed_repeats_and_another_differs(llama):
    hot = [run(llama, PROMPTS, 16, sampling=Sampling(2.0, seed=s)) for s in (0, 0, 1)]
    assert hot[0] == hot[1]
    assert hot[0] != hot[2]


def test_the_first_row_samples_the_same_in_any_batch(llama):
    options = {"sampling": Sampling(1.5, seed=3)}
    alone = run(llama, PROMPTS[:1], 16, **options)
    assert run(llama, PROMPTS, 16, **options)[0] == alone[0]


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-6)]
)
def test_sampling_among_one_is_greedy(llama, sampling):
    assert run(llama, PROMPTS, 8, sampling=sampling) == run(llama, PROMPTS, 8)


def frequencies(logits, sampling, draws=4000):
    """How often each token is drawn, by a model that always answers `logits`."""
    row = jnp.asarray(logits, jnp.float32)

    def apply(params, tokens, positions, cache):
        return jnp.broadcast_to(row, (*tokens.shape, row.size)), cache

    class Shape:
        context, vocab_size = 64, len(logits)
        num_layers, num_kv_heads, head_dim = 1, 1, 2

    out = generate(apply, {}, Shape(), [[0]] * draws, 1, sampling)
    return np.bincount(np.ravel(out), minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Sampling(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(1.0, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        # As transformers does: the nucleus of what top-k leaves (0.57, 0.43).
        (Sampling(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling, expected):
    chances = np.array([0.1, 0.4, 0.2, 0.3])
    got = frequencies(np.log(chances), sampling)[[1, 3, 2, 0]]
    # Four standard deviations of a proportion of 4000 draws.
    assert np.abs(got - expected).max() < 4 * (0.25 / 4000) ** 0.5
    assert (got[np.array(expected) == 0] == 0).all()


def test_the_context_limit_names_its_numbers(llama):
    with pytest.raises(ValueError, match=r"7 tokens and 122.*129.*128.*to 121"):
        run(llama, PROMPTS[1:2], 122)
    assert len(run(llama, PROMPTS[1:2], 121)[0]) == 121


@pytest.mark.parametrize(
    ("prompts", "new", "named"),
    [
        ([], 4, "no prompts"),
        ([[1], []], 4, "prompt 1 has no tokens"),
        ([[1, 64]], 4, "token 64, but the model knows 0 to 63"),
        ([[-2, 3]], 4, "token -2"),
        ([[1]], 0, "max_new_tokens is 0"),
    ],
)
def test_bad_prompts_are_refused(llama, prompts, new, named):
    with pytest.raises(ValueError, match=named):
        run(llama, prompts, new)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
    ],
)
def test_bad_sampling_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**settings)


def test_the_cache_is_no_wider_than_the_weights():
    model = load_huggingface(GOLDEN / "llama3")
    texts = run(model, PROMPTS, 4)
    assert [len(text) for text in texts] == [4] * 4
    leaves = jax.tree.leaves(model.params)
    from jaxq.generation import float_dtype

    assert float_dtype(model.params) == jnp.bfloat16
    assert float_dtype([*leaves, jnp.ones(2, jnp.float32)]) == jnp.float32

"""Every family against transformers' logits, and reading with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxq.checkpoints.huggingface import write_folder
from jaxq.huggingface import load_huggingface
from jaxq.kvcache import cross_cache, empty_cache
from jaxq.models import FAMILIES
from tests.models.seeded import CASES, SEEDED, stored_config, write_seeded

# Both sides compute in float32 and sum in different orders; see test_llama.
TOLERANCE = 1e-4
ARGUMENTS = ("tokens", "targets", "mask")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a case's model and what is stored of it; each is made once."""
    known = {}

    def make(name):
        if name not in known:
            folder = write_seeded(tmp_path_factory.mktemp(name), stored_config(name))
            model = load_huggingface(folder, jnp.float32)
            stored = load_file(SEEDED / name / "golden.safetensors")
            known[name] = model, jax.jit(model.module.apply), stored
        return known[name]

    return make


def slowly(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_transformers(load, name):
    model, apply, stored = load(name)
    given = [jnp.asarray(stored[a]) for a in ARGUMENTS if a in stored]
    got, want = apply(model.params, *given), stored["logits"]
    if "mask" in stored and "targets" not in stored:
        kept = stored["mask"][..., None].astype(bool)
        got, want = np.asarray(got) * kept, want * kept
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


# One case of each row. Where texts turn by their length (dynamic, longrope) pieces turn
# otherwise than the whole, here and in transformers.
@pytest.mark.parametrize(
    "name",
    [
        "mixtral_windowed",
        "gemma3",
        "gpt2",
        "bloom",
        *map(
            slowly,
            (
                "qwen2_moe_mixed",
                "qwen3_moe",
                "gemma2",
                "phi3",
                "opt",
                "gpt_neox",
                "falcon_7b",
                "falcon_40b",
                "falcon_rw",
            ),
        ),
    ],
)
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(load, name):
    model, apply, stored = load(name)
    tokens = jnp.asarray(stored["tokens"])
    cache = empty_cache(model.config, len(tokens), 16, jnp.float32)
    done, pieces = 0, []
    for size in (7, 1, 1):
        piece = tokens[:, done : done + size]
        logits, cache = apply(model.params, piece, None, cache)
        pieces.append(logits)
        done += size
    got, want = jnp.concatenate(pieces, axis=1), stored["logits"][:, :done]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["t5", slowly("t5_gated")])
def test_writing_in_pieces_with_a_cache_equals_reading_at_once(load, name):
    model, apply, stored = load(name)
    tokens, targets, mask = (jnp.asarray(stored[a]) for a in ARGUMENTS)
    cache = cross_cache(model.config, len(tokens), targets.shape[1], jnp.float32)
    logits, cache = apply(model.params, tokens, targets[:, :3], mask, cache)
    pieces, done = [logits], 3
    while done < targets.shape[1]:
        piece = targets[:, done : done + 1]
        logits, cache = apply(model.params, None, piece, None, cache)
        pieces.append(logits)
        done += 1
    assert done > model.config.buckets  # some distances share one
    got, want = jnp.concatenate(pieces, axis=1), stored["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mixtral", "bloom", *map(slowly, ("gpt2", "opt"))])
def test_padding_changes_nothing(load, name):
    model, apply, stored = load(name)
    tokens = jnp.asarray(stored["tokens"][:, :24])
    positions = np.full(tokens.shape, -1, np.int32)
    positions[:, 3:20] = np.arange(17)
    shifted = jnp.roll(tokens, 3, axis=1)
    got = apply(model.params, shifted, jnp.asarray(positions))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(
        got[:, 3:20], stored["logits"][:, :17], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", CASES)
def test_names_and_variables_correspond_one_to_one(name):
    family = FAMILIES[CASES[name][0]]
    config = family.read_config(stored_config(name))
    slots = family.slots(config)
    leaves, _ = jax.tree_util.tree_flatten_with_path(family.abstract(config))
    shapes = {tuple(k.key for k in keys): leaf.shape for keys, leaf in leaves}
    assert {slot.path for slot in slots.values()} == set(shapes)
    sizes = dict.fromkeys(shapes, 0)
    for slot in slots.values():
        sizes[slot.path] += int(np.prod(slot.shape))
    assert sizes == {path: int(np.prod(shape)) for path, shape in shapes.items()}


def test_what_is_stored_stays_small():
    sizes = {n: sum(f.stat().st_size for f in (SEEDED / n).iterdir()) for n in CASES}
    assert max(sizes.values()) < 100_000, sizes


@pytest.mark.compare
@pytest.mark.parametrize("name", CASES)
def test_stored_outputs_are_what_transformers_computes(name, tmp_path):
    from tests.models.make_seeded import transformers_output

    stored = load_file(SEEDED / name / "golden.safetensors")
    given = {n: a for n, a in stored.items() if n != "logits"}
    folder = write_seeded(tmp_path, stored_config(name))
    got = transformers_output(folder, given)
    np.testing.assert_allclose(got, stored["logits"], rtol=0, atol=1e-5)


@pytest.mark.compare
@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_transformers_wrote_gives_its_logits(name, tmp_path):
    import transformers

    from tests.models.make_seeded import transformers_output

    config = stored_config(name)
    kind = getattr(transformers, config["architectures"][0])
    theirs = kind(kind.config_class.from_dict(config)).float()
    if name == "t5_gated":  # whose head transformers 5 ties until a file unties it
        head = theirs.lm_head.weight
        theirs.lm_head.weight = type(head)(1.5 * head.detach())
    theirs.save_pretrained(tmp_path)
    stored = load_file(SEEDED / name / "golden.safetensors")
    given = {n: a for n, a in stored.items() if n != "logits"}
    want = transformers_output(tmp_path, given)
    model = load_huggingface(tmp_path, jnp.float32)
    arrays = [jnp.asarray(given[a]) for a in ARGUMENTS if a in given]
    got = jax.jit(model.module.apply)(model.params, *arrays)
    if "mask" in given and "targets" not in given:
        kept = given["mask"][..., None].astype(bool)
        got, want = np.asarray(got) * kept, want * kept
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.compare
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "gpt2", "gemma2", "bert", "t5"]
)
def test_a_folder_that_is_written_again_is_what_was_read(load, name, tmp_path):
    from tests.models.make_seeded import transformers_output

    model, _, stored = load(name)
    slots = model.family.slots(model.config)
    write_folder(tmp_path, model.hf_config, slots, model.params)
    given = {n: a for n, a in stored.items() if n != "logits"}
    got = transformers_output(tmp_path, given)
    np.testing.assert_allclose(got, stored["logits"], rtol=0, atol=1e-5)

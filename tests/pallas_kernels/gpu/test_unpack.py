"""The GPU layout and the register programs that unpack it: every code, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxq.formats import FORMATS
from jaxq.formats.codebook import CodebookFormat
from jaxq.formats.integer import IntegerFormat
from pallas_kernels import layouts
from pallas_kernels.gpu import layout, unpack, words
from pallas_kernels.kernel import Coding


def coding_of(name, pack=128):
    form = FORMATS[name]
    if isinstance(form, IntegerFormat):
        return Coding("integer", form.bits, pack, int(form.lowest))
    if isinstance(form, CodebookFormat):
        return Coding("table", form.bits, pack, table=form.table)
    return Coding(form.dtype, form.bits, pack)


FLOATING = [
    name
    for name, form in FORMATS.items()
    if form.bits <= 4 or not isinstance(form, CodebookFormat)
]

# One of every way to unpack; the others take the same paths.
FEW = ("uint2", "int3", "int4", "int8", "uint8", "nf4", "fp8_e4m3")


def relaid(rng, name, pack, columns=3, blocks=2):
    coding = coding_of(name, pack)
    rows = layout.Block(coding.bits).rows * blocks
    codes = rng.integers(0, 2**coding.bits, (2, rows, columns)).astype(np.uint8)
    planar = layouts.pack(jnp.asarray(codes), coding.bits, 1, pack)
    return coding, codes, planar, layout.prepack(planar, coding)


@pytest.mark.parametrize(
    ("bits", "pack"),
    [(1, 128), (2, 32), (3, 128), (4, 64), (7, 64), (8, 128)],
)
def test_layout_is_a_bijection_of_the_same_size(rng, bits, pack):
    coding = Coding("integer", bits, 1 if bits == 8 else pack)
    rows = layout.Block(bits).rows * 3
    codes = rng.integers(0, 2**bits, (2, rows, 5)).astype(np.uint8)
    planar = layouts.pack(jnp.asarray(codes), bits, 1, coding.pack)
    packed = layout.prepack(planar, coding)
    assert packed.dtype == jnp.uint16
    assert packed.nbytes == planar.nbytes
    assert layout.matrix(packed.shape, coding) == (rows, 5)
    np.testing.assert_array_equal(layout.unpack(packed, coding), planar)
    np.testing.assert_array_equal(layout.fields_of(packed, coding), codes)


def test_field_is_where_the_layout_says(rng):
    """The sketch of the docstring, written out in numpy."""
    _, codes, _, packed = relaid(rng, "int4", 128)
    slabs = np.asarray(packed).reshape(2, 2, 3, 32)
    blocks = codes.reshape(2, 2, 4, 32, 3).astype(np.uint16)
    expected = sum(blocks[:, :, i] << (4 * i) for i in range(4))
    np.testing.assert_array_equal(slabs, expected.swapaxes(-1, -2))


def test_rows_are_filled_up_with_zero_codes(rng):
    coding = Coding("integer", 4, 8)
    codes = rng.integers(1, 16, (136, 8)).astype(np.uint8)
    packed = layout.prepack(layouts.pack(jnp.asarray(codes), 4, 0, 8), coding)
    filled = np.asarray(layout.fields_of(packed, coding))
    np.testing.assert_array_equal(filled[:136], codes)
    np.testing.assert_array_equal(filled[136:], np.zeros((256 - 136, 8)))


def run(program, block_words, choice):
    """Run a program on words ``[slabs, N, 32]``, two by two."""
    pairs = lax.bitcast_convert_type(
        jnp.asarray(block_words).reshape(*block_words.shape[:-1], 16, 2), jnp.uint32
    )
    return program(words.Arrays(), list(pairs), choice)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, "bfloat16", marks=() if name in FEW else pytest.mark.aot)
        for name in FLOATING
    ]
    + [(name, "float16") for name in ("int4", "int8", "uint8", "nf4", "fp8_e5m2")],
)
def test_floats_are_the_formats_numbers(rng, name, dtype):
    coding, codes, _, packed = relaid(rng, name, 128)
    block = layout.Block(coding.bits)
    floats = unpack.Floats(coding, dtype)
    planes = range(block.planes)
    slabs = np.asarray(packed).reshape(-1, block.slabs, 3, 32)[0]
    assert floats.slabs(planes) == list(range(block.slabs))
    found = jnp.stack(run(floats.program, slabs, planes))
    found = lax.bitcast_convert_type(
        lax.bitcast_convert_type(found, jnp.uint16), jnp.dtype(dtype)
    )
    numbers = np.asarray(found.astype(jnp.float32)).reshape(block.planes, 3, 32)
    expected = np.asarray(
        FORMATS[name].decode(jnp.asarray(codes[0, : block.rows])).astype(dtype)
    ).astype(np.float32)
    expected = expected.reshape(block.planes, 32, 3).swapaxes(1, 2)
    number = np.isfinite(expected)
    np.testing.assert_array_equal(numbers[number], expected[number])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["int4", "int3", "int8", "uint8", "uint2"])
def test_kept_offset_is_the_difference(rng, name, dtype):
    coding, _, _, packed = relaid(rng, name, 128)
    block = layout.Block(coding.bits)
    slabs = np.asarray(packed).reshape(-1, block.slabs, 3, 32)[0]

    def numbers(keep):
        program = unpack.Floats(coding, dtype, keep).program
        found = jnp.stack(run(program, slabs, range(block.planes)))
        halves = lax.bitcast_convert_type(found, jnp.uint16)
        return lax.bitcast_convert_type(halves, jnp.dtype(dtype)).astype(jnp.float32)

    offset = unpack.Floats(coding, dtype, True).offset
    np.testing.assert_array_equal(numbers(True) - offset, numbers(False))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "uint2"])
def test_bytes_are_int8_in_the_order_of_permuted(rng, name, zeros):
    coding, codes, _, packed = relaid(rng, name, 128)
    block, form = layout.Block(coding.bits), FORMATS[name]
    slab = np.asarray(packed).reshape(-1, 1, 3, 32)[0]
    zero = rng.integers(int(form.lowest), int(form.highest) + 1)
    less = jnp.full((3, 16), int(zero - form.lowest) * 0x01010101, jnp.uint32)
    pairs = lax.bitcast_convert_type(jnp.asarray(slab[0]).reshape(3, 16, 2), jnp.uint32)
    program = unpack.Bytes(coding, zeros).program
    operands = [pairs, less] if zeros else [pairs]
    found = program(words.Arrays(), operands, range(8 // coding.bits))
    int8 = lax.bitcast_convert_type(jnp.stack(found), jnp.int8)
    int8 = np.asarray(int8).transpose(1, 0, 2, 3).reshape(3, block.rows)
    values = np.asarray(form.decode(jnp.asarray(codes[0, : block.rows])))
    values = values - (zero if zeros else 0)
    order = layout.permuted(jnp.asarray(values.T), coding.bits)
    np.testing.assert_array_equal(int8, order)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_cache_bytes_are_exact_numbers(bits, dtype):
    """All 256 bytes."""
    every = jnp.arange(256, dtype=jnp.uint8)
    fours = lax.bitcast_convert_type(every.reshape(64, 4), jnp.uint32)
    floats = unpack.CacheFloats(bits, dtype)
    fields = [every & 15, every >> 4] if bits == 4 else [every]
    for field, codes in enumerate(fields):
        found = jnp.stack(floats.program(words.Arrays(), [fours], field), axis=-1)
        halves = lax.bitcast_convert_type(found, jnp.uint16)
        numbers = lax.bitcast_convert_type(halves, jnp.dtype(dtype)).reshape(-1)
        signed = np.asarray(codes).view(np.int8)
        expected = signed.astype(np.float32) - (8 if bits == 4 else 0)
        np.testing.assert_array_equal(numbers.astype(jnp.float32), expected)


def test_prmt_picks_bytes_and_signs():
    m = words.Arrays()
    picked = m.prmt(0x83828180, 0x07060504, 0x7C30)
    # byte 0, byte 3, the sign of byte 4, byte 7
    assert hex(int(picked)) == "0x7008380"


@pytest.mark.parametrize(
    ("table", "function"),
    [
        (words.AND_OR, lambda a, b, c: (a & b) | c),
        (words.AND_XOR, lambda a, b, c: (a & b) ^ c),
        (words.NOT_AND_OR, lambda a, b, c: (~a & b) | c),
        (words.SELECT, lambda a, b, c: (a & b) | (~a & c)),
    ],
)
def test_truth_tables(rng, table, function):
    a, b, c = rng.integers(0, 2**32, (3, 50), dtype=np.uint32)
    found = words.Arrays().lop3(*map(jnp.asarray, (a, b, c)), table)
    np.testing.assert_array_equal(found, function(a, b, c))


@pytest.mark.parametrize("name", ["int4", "int3", "int8", "nf4", "fp8_e4m3"])
def test_programs_print_as_ptx(name):
    floats = unpack.Floats(coding_of(name), "bfloat16")
    block = layout.Block(floats.coding.bits)
    planes = range(block.planes)
    text = words.assemble(
        lambda m, w: floats.program(m, w, planes), block.slabs, block.planes
    )
    assert text.results == block.planes
    assert text.constraints.count("=r") == block.planes
    assert all(f"mov.b32 ${i}," in text.text for i in range(block.planes))


def test_a_program_must_return_what_it_says():
    with pytest.raises(ValueError, match="returns 1 words, not 2"):
        words.assemble(lambda m, w: [w[0]], 1, 2)


def test_relayout_traces_once_for_abstract_codes():
    coding = coding_of("int4")
    shape = jax.eval_shape(
        lambda c: layout.prepack(c, coding),
        jax.ShapeDtypeStruct((7, 128, 24), jnp.uint8),
    )
    assert shape.shape == (7, 2, 24 * 32)

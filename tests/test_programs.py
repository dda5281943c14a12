"""The compiled programs of a step: what XLA made of them."""

import dataclasses
import functools
import math
import re
from typing import Any

import fakes
import jax
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import carry, decoding, programs
from hipgpt_jax.model import cache as kv

MODEL = config.ModelConfig(vocab_size=700, max_seq_len=256, embed_dim=96, num_heads=3, ff_hidden_dim=352, num_layers=2)
KERNEL = MODEL.embed_dim * MODEL.embed_dim  # elements of the smallest
MOVES = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|transpose)\(")


def moved(compiled: Any) -> list[int]:
    """Elements of every copy and transpose in an optimized program, inside fusions too."""
    sizes = (match[1] for match in MOVES.finditer(compiled.as_text()))
    return [math.prod(map(int, shape.split(","))) for shape in sizes]


def made_for(rows: int, model: config.ModelConfig = MODEL, **settings: Any) -> programs.Programs:
    settings = {"window": model.max_seq_len, "stride": 1, "dtype": "float32", "attention": "xla", **settings}
    made = programs.Programs(model, rows, platform="cpu", **settings)
    made.load(fakes.random_params(model))
    return made


@pytest.mark.parametrize("rows", [1, 8])
def test_steps_copy_no_weights_no_head_and_no_cache_and_write_that_where_it_lies(rows: int) -> None:
    made = made_for(rows)
    of_rows, state = carry.blank(rows, MODEL.max_seq_len, MODEL.vocab_size)
    cache = kv.empty(MODEL, rows, made.sizes, made.dtype)
    written = 1 if rows == 1 else len(cache)  # a lone row stands in the last part
    none_B = np.zeros(rows, np.int32)
    step: Any = made.steps.lower(
        made.params, of_rows, state, cache[:-written], cache[-written:], none_B, none_B
    ).compile()
    assert moved(step), "the pattern finds the small copies there are"
    assert max(moved(step)) < min(KERNEL, cache[0].keys[0].size)
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(cache[-written:]))
    assert memory.temp_size_in_bytes < rows * 10 * 4 * MODEL.vocab_size, "ten rows of logits"


def test_a_prompt_is_read_without_the_head() -> None:
    """Nor is what the last block's feed-forward makes of it: the first step takes in the last token."""
    made = made_for(2)
    fill = made.fill.lower(made.params, np.zeros((2, 12), np.int32)).compile().as_text()
    logits, hidden = f"[2,{MODEL.vocab_size}]", f"[24,{MODEL.ff_hidden_dim}]"
    assert fill.count(logits) == 0
    assert fill.count(hidden) > 0
    least = made_for(2, dataclasses.replace(MODEL, num_layers=1))
    assert least.fill.lower(least.params, np.zeros((2, 12), np.int32)).compile().as_text().count(hidden) == 0
    cache, none_B = kv.empty(MODEL, 2, (64,), "float32"), np.zeros(2, np.int32)
    step = made.steps.lower(made.params, *carry.blank(2, 256, 700), (), cache, none_B, none_B)
    assert step.compile().as_text().count(logits) > 0


def test_a_user_s_own_xla_flag_decides() -> None:
    ((flag, _),) = programs.in_place({}).items()
    assert programs.in_place({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}) == {flag: True}
    for value in ("true", "false"):
        assert programs.in_place({"XLA_FLAGS": f"--{flag}={value}"}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dtype", "most"),
    [(1, "float32", 8), (3, "float32", 4), (1, "float32", 1), (1, "bfloat16", 3), (3, "bfloat16", 1)],
)
def test_steps_give_the_bits_of_a_step_that_copies_the_cache(rows: int, dtype: str, most: int) -> None:
    """XLA must not write a slot before what was in the buffer is read; a row that has no steps left stays as it is."""
    window, model, rng = 70, dataclasses.replace(MODEL, num_layers=1), np.random.RandomState(rows)
    made = made_for(rows, model, window=window, dtype=dtype)
    of_rows, state = carry.blank(rows, window, MODEL.vocab_size, made.device)
    cache, kept = (kv.empty(model, rows, made.sizes, dtype, made.device) for _ in range(2))
    expected, length_B, end_B = state, np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    plain = jax.jit(functools.partial(decoding.decode_step, made.module, made.params, of_rows))
    while (longest := int(length_B.max())) < window:
        live = made.part_of(longest) + 1
        count = min(most, made.starts[live] - longest)
        left_B = rng.randint(0, count + 1, rows).astype(np.int32)
        left_B[length_B.argmax()] = count
        first = live - 1 if rows == 1 else 0
        state, own, told = made.steps(made.params, of_rows, state, cache[:first], cache[first:live], left_B, end_B)
        cache = (*cache[:first], *own, *cache[live:])
        for index in range(count):
            expected, parts = plain(expected, kept[:live], live_B=index < left_B)
            kept = (*parts, *kept[live:])
            np.testing.assert_array_equal(told.logits_BV[index], expected.logits_BV)
        length_B += left_B
    jax.tree.map(np.testing.assert_array_equal, (state, cache), (expected, kept))


def test_a_row_ends_with_its_end_token_and_the_others_go_on() -> None:
    made = made_for(2, dataclasses.replace(MODEL, num_layers=1))
    of_rows, start = carry.blank(2, MODEL.max_seq_len, MODEL.vocab_size, made.device)

    def steps(left_B: list[int], end_B: list[int]) -> tuple[carry.State, np.ndarray]:
        cache = made.empty(2, made.sizes[:1])
        arguments = of_rows, start, (), cache, np.array(left_B, np.int32), np.array(end_B, np.int32)
        state, _, told = made.steps(made.params, *arguments)
        return state, np.asarray(told.token_B)

    whole, token_TB = steps([4, 4], [-1, -1])
    assert whole.index_B.tolist() == [4, 4]
    end = int(token_TB[1, 0])
    assert end not in token_TB[[0, 2, 3], 0], "the first row draws it once"
    state, told_TB = steps([4, 3], [end, -1])
    assert state.index_B.tolist() == state.length_B.tolist() == [2, 3]
    assert state.token_B.tolist() == [end, token_TB[2, 1]]
    np.testing.assert_array_equal(told_TB[:2], token_TB[:2])
    assert told_TB[3].tolist() == [0, 0], "no fourth step is taken, as no row goes on"

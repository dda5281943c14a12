"""The compiled programs of a step: what XLA made of them."""

import dataclasses
import math
import re
from typing import Any

import fakes
import jax
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import carry, programs
from hipgpt_jax.model import cache as kv

MODEL = config.ModelConfig(vocab_size=700, max_seq_len=256, embed_dim=96, num_heads=3, ff_hidden_dim=352, num_layers=2)
KERNEL = MODEL.embed_dim * MODEL.embed_dim  # elements of the smallest
MOVES = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|transpose)\(")


def moved(compiled: Any) -> list[int]:
    """Elements of every copy and transpose in an optimized program, inside fusions too."""
    sizes = (match[1] for match in MOVES.finditer(compiled.as_text()))
    return [math.prod(map(int, shape.split(","))) for shape in sizes]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_copies_no_weights_no_head_and_no_cache(rows: int) -> None:
    made = programs.Programs(MODEL, MODEL.max_seq_len, 1, "float32", "xla", "cpu")
    made.load(fakes.random_params(MODEL))
    of_rows, state = carry.blank(rows, MODEL.max_seq_len, MODEL.vocab_size)
    cache = kv.empty(MODEL, rows, made.sizes, made.dtype)
    advance: Any = made.advance.lower(made.params, of_rows, state, cache).compile()
    large = min(KERNEL, cache[0].keys[0].size)
    assert moved(advance), "the pattern finds the small copies there are"
    assert max(moved(advance)) < large
    assert advance.memory_analysis().temp_size_in_bytes < rows * 10 * 4 * MODEL.vocab_size, "ten rows of logits"

    _, new = made.advance(made.params, of_rows, state, cache)
    append: Any = made.append.lower(cache[0], new, state.length_B, 0).compile()
    assert max(moved(append), default=0) < large
    memory, part_bytes = append.memory_analysis(), sum(leaf.nbytes for leaf in jax.tree.leaves(cache[0]))
    assert memory.alias_size_in_bytes == part_bytes, "it is written where it lies"
    assert memory.temp_size_in_bytes < part_bytes / 16


def test_a_lone_row_s_steps_copy_no_weights_and_no_cache_and_writes_it_where_it_lies() -> None:
    made = programs.Programs(MODEL, MODEL.max_seq_len, 1, "float32", "xla", "cpu")
    made.load(fakes.random_params(MODEL))
    rows, state = carry.blank(1, MODEL.max_seq_len, MODEL.vocab_size)
    *before, last = kv.empty(MODEL, 1, made.sizes, made.dtype)
    step: Any = made.lone_steps.lower(made.params, rows, state, tuple(before), last, 1, -1).compile()
    assert max(moved(step)) < min(KERNEL, last.keys[0].size)
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(last))
    assert memory.temp_size_in_bytes < 10 * 4 * MODEL.vocab_size


def test_a_prompt_is_read_without_the_head() -> None:
    """Nor is what the last block's feed-forward makes of it: the first step takes in the last token."""
    made = programs.Programs(MODEL, MODEL.max_seq_len, 1, "float32", "xla", "cpu")
    made.load(fakes.random_params(MODEL))
    fill = made.fill.lower(made.params, np.zeros((2, 12), np.int32)).compile().as_text()
    logits, hidden = f"[2,{MODEL.vocab_size}]", f"[24,{MODEL.ff_hidden_dim}]"
    assert fill.count(logits) == 0
    assert fill.count(hidden) > 0
    one_layer = dataclasses.replace(MODEL, num_layers=1)
    least = programs.Programs(one_layer, MODEL.max_seq_len, 1, "float32", "xla", "cpu")
    least.load(fakes.random_params(one_layer))
    assert least.fill.lower(least.params, np.zeros((2, 12), np.int32)).compile().as_text().count(hidden) == 0
    step = made.advance.lower(made.params, *carry.blank(2, 256, 700), kv.empty(MODEL, 2, (64,), "float32"))
    assert step.compile().as_text().count(logits) > 0


def test_a_user_s_own_xla_flag_decides() -> None:
    ((flag, _),) = programs.in_place({}).items()
    assert programs.in_place({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}) == {flag: True}
    for value in ("true", "false"):
        assert programs.in_place({"XLA_FLAGS": f"--{flag}={value}"}) == {}


@pytest.mark.parametrize(
    ("dtype", "count"), [("float32", 8), *(pytest.param(x, 1, marks=pytest.mark.slow) for x in ("float32", "bfloat16"))]
)
def test_a_lone_row_s_steps_give_the_bits_of_the_two_programs(dtype: str, count: int) -> None:
    """XLA must not write a slot before what was in the buffer is read: the caches are the same at a full window."""
    window, model = 70, dataclasses.replace(MODEL, num_layers=1)
    made = programs.Programs(model, window, 1, dtype, "xla", "cpu")
    made.load(fakes.random_params(model))
    rows, state = carry.blank(1, window, MODEL.vocab_size, made.device)
    caches = [list(kv.empty(model, 1, made.sizes, dtype, made.device)) for _ in range(2)]
    states = [state, state]
    left = 0
    for length in range(window):
        part = made.part_of(length)
        before = states[0]
        states[0], new = made.advance(made.params, rows, before, tuple(caches[0][: part + 1]))
        caches[0][part] = made.append(caches[0][part], new, before.length_B, made.starts[part])
        left += 1
        if left == count or length + 1 in made.starts:
            *others, last = caches[1][: part + 1]
            arguments = made.params, rows, states[1], tuple(others), last, left, -1
            states[1], caches[1][part], told = made.lone_steps(*arguments)
            np.testing.assert_array_equal(told.logits_BV[left - 1], states[0].logits_BV)
            left = 0
    jax.tree.map(np.testing.assert_array_equal, (states[1], caches[1]), (states[0], caches[0]))

"""The compiled programs of a step: what XLA made of them."""

import math
import re
from typing import Any

import fakes
import jax
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, programs
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
    made = programs.Programs(MODEL, MODEL.max_seq_len, 1, "float32", "xla")
    made.load(fakes.random_params(MODEL))
    of_rows, state = decoding.blank(rows, MODEL.max_seq_len, MODEL.vocab_size)
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

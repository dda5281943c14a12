"""Tests of the compiled programs: their optimized HLO, and that in-place cache updates change no bit."""

import dataclasses
import functools
import math
import re
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import backends, decoding, executables
from hipgpt_jax.model import cache as kv

MODEL = config.ModelConfig(vocab_size=700, max_seq_len=256, embed_dim=96, num_heads=3, ff_hidden_dim=352, num_layers=2)
KERNEL = MODEL.embed_dim * MODEL.embed_dim  # elements of the smallest weight matrix
MOVES = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|transpose)\(")


def moved(compiled: Any) -> list[int]:
    """Returns the number of elements of every copy and transpose in an optimized program, fusions included."""
    sizes = (match[1] for match in MOVES.finditer(compiled.as_text()))
    return [math.prod(map(int, shape.split(","))) for shape in sizes]


def executables_for(rows: int, model: config.ModelConfig = MODEL, dtype: str = "float32") -> executables.Executables:
    window = model.max_seq_len
    programs = executables.Executables(model, dtype, window, 1, "xla", backends.backend_for("cpu", model, window, rows))
    programs.load(fakes.random_params(model))
    return programs


def optimized(programs: executables.Executables, name: str, **key: int) -> Any:
    """Returns the optimized HLO of a program."""
    return programs.lower(executables.Program(name, **key)).compile().as_text()


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding_copies_no_weights_and_updates_the_cache_in_place(rows: int) -> None:
    programs = executables_for(rows)
    blocks = programs.blocks(rows, 0, 2)
    writable = programs.backend.split(blocks).writable
    assert len(writable) == (1 if rows == 1 else 2), "a single slot writes only to the last block"
    step = programs.lower(executables.Program("decode", blocks=2)).compile()
    assert moved(step), "the pattern matches small copies"
    assert max(moved(step)) < min(KERNEL, blocks[0].keys[0].size)
    memory: Any = step.memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(writable))
    assert cache_bytes <= memory.alias_size_in_bytes < cache_bytes + rows * 10 * 4 * MODEL.vocab_size
    assert memory.temp_size_in_bytes < rows * 10 * 4 * MODEL.vocab_size, "ten rows of logits"


def test_a_prompt_is_prefilled_without_the_head_and_the_last_feed_forward_layer() -> None:
    """The first decode step reads the last token of the prompt and computes both."""
    logits, hidden = f"[2,{MODEL.vocab_size}]", f"[24,{MODEL.ff_hidden_dim}]"
    prefill = optimized(executables_for(2), "prefill", rows=2, length=12)
    assert prefill.count(logits) == 0
    assert prefill.count(hidden) > 0
    one_layer = executables_for(2, dataclasses.replace(MODEL, num_layers=1))
    assert optimized(one_layer, "prefill", rows=2, length=12).count(hidden) == 0
    assert optimized(one_layer, "decode", blocks=1).count(logits) > 0


def test_the_users_xla_flag_takes_precedence() -> None:
    ((flag, _),) = backends.in_place_options({}).items()
    assert backends.in_place_options({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}) == {flag: True}
    for value in ("true", "false"):
        assert backends.in_place_options({"XLA_FLAGS": f"--{flag}={value}"}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dtype", "most"),
    [(1, "float32", 8), (3, "float32", 4), (1, "float32", 1), (1, "bfloat16", 3), (3, "bfloat16", 1)],
)
def test_decoding_in_place_equals_decoding_with_copies(rows: int, dtype: str, most: int) -> None:
    """XLA must not write a slot before its buffer is read; a slot at its limit is left unchanged."""
    model, rng = dataclasses.replace(MODEL, num_layers=1, max_seq_len=70), np.random.RandomState(rows)
    programs = executables_for(rows, model, dtype)
    num_blocks = len(programs.backend.layout.block_sizes)
    blocks, expected_blocks = (programs.empty_blocks(0, num_blocks) for _ in range(2))
    state, length_B = programs.blank_state()._replace(eos_B=np.full(rows, -1, np.int32)), np.zeros(rows, np.int32)
    expected = jax.tree.map(jnp.copy, state)
    plain = jax.jit(functools.partial(decoding.decode_step, programs.module, programs.params))
    while (longest := int(length_B.max())) < model.max_seq_len:
        live, count = programs.backend.plan_steps(longest)
        count = min(most, count)
        steps_B = rng.randint(0, count + 1, rows).astype(np.int32)
        steps_B[length_B.argmax()] = count
        length_B += steps_B
        cache = programs.backend.split(blocks[:live])
        limited = state._replace(limit_B=length_B, cache=cache._replace(frozen=()))
        state, output = programs.run(executables.Program("decode", blocks=live), programs.params, limited, cache.frozen)
        blocks = (*cache.frozen, *state.cache.writable, *blocks[live:])
        for index in range(count):
            limit_B = length_B - steps_B + np.minimum(steps_B, index + 1)
            expected = expected._replace(limit_B=limit_B, cache=kv.Cache((), expected_blocks[:live]))
            active_B = np.asarray(decoding.is_active(expected))
            expected, one = plain(expected)
            expected_blocks = (*expected.cache.writable, *expected_blocks[live:])
            np.testing.assert_array_equal(output.logits_BV[index][active_B], one.logits_BV[active_B])
    for now, then in zip(
        jax.tree.leaves((state[4:-1], blocks)), jax.tree.leaves((expected[4:-1], expected_blocks)), strict=True
    ):
        np.testing.assert_array_equal(now, then)


@pytest.mark.slow
def test_a_finished_slot_takes_no_further_step_while_others_continue() -> None:
    programs = executables_for(2, dataclasses.replace(MODEL, num_layers=1))

    def decode(limits: list[int], ends: list[int]) -> tuple[decoding.DecodeState, np.ndarray]:
        state = programs.blank_state()._replace(limit_B=np.array(limits, np.int32), eos_B=np.array(ends, np.int32))
        state = state._replace(cache=kv.Cache((), programs.empty_blocks(0, 1)))
        state, output = programs.run(executables.Program("decode", blocks=1), programs.params, state, ())
        return state, np.asarray(output.token_B)

    whole, token_TB = decode([4, 4], [-1, -1])
    assert whole.num_sampled_B.tolist() == [4, 4]
    end = int(token_TB[1, 0])
    assert end != token_TB[0, 0], "the first slot samples it second"
    state, output_TB = decode([4, 3], [end, -1])
    assert state.num_sampled_B.tolist() == state.length_B.tolist() == [2, 3]
    assert state.token_B.tolist() == [end, token_TB[2, 1]]
    np.testing.assert_array_equal(output_TB[:2], token_TB[:2])
    assert output_TB[3].tolist() == [0, 0], "no fourth step is taken, as no slot is active"

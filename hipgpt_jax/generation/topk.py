"""Candidates of a draw: the most likely tokens in order, in numbers that suit the platform."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config

# A temperature below this counts as 0: the most likely token is taken.
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
# A temperature above this is lowered to it. Its inverse, by which XLA multiplies, would be flushed to 0, and 0 times
# minus infinity, the logit of a banned token, is NaN.
LARGEST_TEMPERATURE = 2.0**126

# CPU: enough for the default top_k, then for every documented one. V 50257: top_k(128) takes 0.2 ms, a sort 18 ms.
# V 5000, 16 rows: top_k(16) takes 0.12 ms, top_k(128) 0.62 ms.
_CPU_BUCKETS = (16, 128)
# GPU: a condition makes the host wait. Three of them made a step of GPT-2 on an H200 take 1.6 ms instead of 1.1 ms.
# So a step has one bucket there, and a second program serves slots that need the whole vocabulary.
_GPU_BUCKETS = (64,)
# A GPU sorts for a top_k above 16. To find 65 of 50257, sorting the maxima of 1571 chunks and then 65 chunks is
# cheaper.
_CHUNK = 32

# Function of the logits [V], the context [W] and its length; returns logits [V].
Rule = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Plan(NamedTuple):
    """Numbers of candidates that a program provides. The results are the same for every plan that has enough.

    Attributes:
        vocab_size: Size of the vocabulary, ``V``.
        buckets: Numbers of candidates, ascending. A row uses the smallest bucket that its settings need. A row that
            needs more than the last bucket has an undefined result.
        chunked: Whether the largest chunks are found before their elements are sorted.
        bans_repeats: Whether a row may ban repeated n-grams.
        rule: The caller's own function of the logits; see ``api.Run.generate``.
    """

    vocab_size: int
    buckets: tuple[int, ...]
    chunked: bool
    bans_repeats: bool = True
    rule: Rule | None = None

    @property
    def few(self) -> tuple[int, ...]:
        """The buckets below the vocabulary."""
        return tuple(size for size in self.buckets if size < self.vocab_size)

    @property
    def smallest(self) -> "Plan":
        """The plan with the first bucket alone, for rows that do not ban repeats."""
        return self._replace(buckets=self.buckets[:1], bans_repeats=False) if len(self.buckets) > 1 else self

    @property
    def full_vocab(self) -> "Plan":
        """The plan with the last bucket alone, the whole vocabulary."""
        return self._replace(buckets=self.buckets[-1:])

    def needs_full_vocab(self, settings: config.SamplingConfig) -> bool:
        """Returns whether ``smallest`` does not suffice for a slot with these settings."""
        needed = settings.top_k if 0 < settings.top_k < self.buckets[-1] else self.buckets[-1]
        is_greedy = min(settings.temperature, 1.0) < SMALLEST_TEMPERATURE
        return settings.no_repeat_ngram > 0 or (needed > self.buckets[0] and not is_greedy)


def plan_for(V: int, platform: str) -> Plan:
    """Returns the plan of a platform for a vocabulary of ``V``; its last bucket is the whole vocabulary.

    >>> plan_for(5000, "cpu").buckets, plan_for(100, "cpu").buckets
    ((16, 128, 5000), (16, 100))
    """
    buckets = _CPU_BUCKETS if platform == "cpu" else _GPU_BUCKETS
    return Plan(V, (*(size for size in buckets if size < V), V), chunked=platform != "cpu")


def candidates(logits_BV: jax.Array, num: int, *, chunked: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the ``num`` largest logits and their ids ``[B, K]``, in descending order; ties go to the lower id."""
    find = top_in_chunks if chunked and num < logits_BV.shape[1] else jax.lax.top_k
    # The barriers keep XLA from sorting the whole vocabulary for a top_k that is sliced later: 6.1 ms instead of 0.1.
    # There is one for each result, because a barrier of both crashes XLA's compiler if devices share the model.
    sorted_BK, id_BK = map(jax.lax.optimization_barrier, find(logits_BV, num))
    return sorted_BK, id_BK


def all_candidates(logits_BV: jax.Array, needs_order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns all logits and their ids ``[B, V]``; sorted only if their order matters, a boolean."""
    # V 50257, a CPU: sorting takes 18 ms, drawing without it 4 ms.
    B, V = logits_BV.shape
    id_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None], (B, V))
    return jax.lax.cond(needs_order, lambda x: tuple(jax.lax.top_k(x, V)), lambda x: (x, id_BV), logits_BV)


def few_candidates(logits_BV: jax.Array, plan: Plan, needed_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the candidates of the largest bucket below the vocabulary, and one more ``[B, K]``.

    If no row needs more than the smallest bucket, those beyond it are minus infinity.

    Args:
        logits_BV: Logits.
        plan: A plan with a bucket below the vocabulary.
        needed_B: Number of candidates that each row needs.
    """
    smallest, *_, largest = (*plan.few[:1], *plan.few)

    def find_smallest(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        sorted_BK, id_BK = candidates(logits_BV, smallest + 1, chunked=plan.chunked)
        padding = ((0, 0), (0, largest - smallest))
        return (
            jnp.pad(sorted_BK, padding, constant_values=-jnp.inf),
            jnp.pad(id_BK, padding, constant_values=logits_BV.shape[1]),
        )

    if smallest == largest:
        return find_smallest(logits_BV)
    find = functools.partial(candidates, num=largest + 1, chunked=plan.chunked)
    return jax.lax.cond(jnp.any(needed_B > smallest), lambda x: tuple(find(x)), find_smallest, logits_BV)


def top_in_chunks(x_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the result of ``lax.top_k`` by two small sorts: values and indices ``[B, k]``, ties by the lower index.

    None of the ``k`` largest elements lies outside the ``k`` chunks with the largest maxima, since each of those
    chunks holds an element that precedes it.
    """
    B, V = x_BV.shape
    chunks = -(-V // _CHUNK)
    padded_BV = jnp.pad(x_BV, ((0, 0), (0, chunks * _CHUNK - V)), constant_values=-jnp.inf)
    x_BCX = padded_BV.reshape(B, chunks, _CHUNK)
    _, best_BK = jax.lax.top_k(x_BCX.max(axis=-1), min(k, chunks))
    few = jnp.take_along_axis(x_BCX, best_BK[:, :, None], axis=1).reshape(B, -1)
    within_X = jnp.arange(_CHUNK, dtype=best_BK.dtype)
    index = (best_BK[:, :, None] * _CHUNK + within_X[None, None]).reshape(B, -1)
    descending, index = jax.lax.sort((-few, index), num_keys=2)
    return -descending[:, :k], index[:, :k]


def at_rank(x_BK: jax.Array, rank_B: jax.Array) -> jax.Array:
    """Returns the element of each row at its rank."""
    return jnp.take_along_axis(x_BK, rank_B[:, None], axis=-1, mode="promise_in_bounds")[:, 0]

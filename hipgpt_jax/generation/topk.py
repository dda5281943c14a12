"""Candidates of a draw: the most likely tokens in order, in numbers that suit the platform."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config

# A temperature below this is 0: the most likely token is taken.
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
# A temperature above this is as high. Its inverse, by which XLA multiplies, would be flushed to 0, and 0 times minus
# infinity, the logit of a banned token, is NaN.
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

_Result = TypeVar("_Result")

# Function of the logits [V], the context [W] and its length; returns logits [V].
Rule = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Plan(NamedTuple):
    """Numbers of candidates that a program provides. The results are the same for every plan that has enough.

    Attributes:
        buckets: Numbers of candidates, ascending. A row uses the smallest bucket that its settings need. A row that
            needs more than the last bucket has an undefined result.
        chunked: Whether the largest chunks are found before their elements are sorted.
        skips_sort: Whether rows that keep the whole vocabulary are drawn without sorting it.
        bans_repeats: Whether a row may ban repeated n-grams.
        rule: The caller's own function of the logits; see ``api.Run.generate``.
    """

    buckets: tuple[int, ...]
    chunked: bool
    skips_sort: bool = False
    bans_repeats: bool = True
    rule: Rule | None = None

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
    small = tuple(size for size in buckets if size < V)
    return Plan((*small, V), chunked=platform != "cpu", skips_sort=platform == "cpu" and _CPU_BUCKETS[-1] < V)


def candidates(logits_BV: jax.Array, num: int, *, chunked: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the ``num`` largest logits and their ids ``[B, K]``, in descending order; ties go to the lower id."""
    find = top_in_chunks if chunked and num < logits_BV.shape[1] else jax.lax.top_k
    # The barrier keeps XLA from sorting the whole vocabulary for a top_k that is sliced later: 6.1 ms instead of 0.1.
    return jax.lax.optimization_barrier(find(logits_BV, num))


def choose_bucket(
    choose: Callable[[int], tuple[_Result, jax.Array]],
    choose_unsorted: Callable[[], _Result],
    none: _Result,
    plan: Plan,
    top_k_B: jax.Array,
    cuts_by_mass_B: jax.Array,
) -> _Result:
    """Takes each row's result from the smallest bucket that holds all candidates that the row keeps.

    So a row's result does not depend on the settings of the rows beside it.

    Args:
        choose: Function of the number of candidates; returns arrays ``[B]``, and whether those were enough.
        choose_unsorted: Returns the arrays of rows that keep the whole vocabulary.
        none: Arrays of the same shapes, for rows without a result yet.
        plan: The buckets.
        top_k_B: Number of candidates that top-k keeps; 0 keeps all.
        cuts_by_mass_B: Rows that may keep fewer, as the probabilities decide.
    """
    if len(plan.buckets) == 1:
        return choose(plan.buckets[0])[0]
    keeps_all_B = (top_k_B == 0) & ~cuts_by_mass_B
    chosen, is_done_B = none, jnp.zeros(len(top_k_B), bool)
    for index, num in enumerate(plan.buckets):
        # Whether the probabilities cut enough is tried only in the last bucket below the vocabulary.
        may_cut_B = (top_k_B == 0) & cuts_by_mass_B & (index == len(plan.buckets) - 2)
        may_fit_B = ((top_k_B > 0) & (top_k_B <= num)) | may_cut_B
        if index == len(plan.buckets) - 1:
            may_fit_B = ~keeps_all_B if plan.skips_sort else jnp.ones(len(top_k_B), bool)
        update = functools.partial(_update_rows, functools.partial(choose, num), may_fit_B & ~is_done_B)
        chosen, is_done_B = jax.lax.cond(
            jnp.any(may_fit_B & ~is_done_B), update, lambda *unchanged: unchanged, chosen, is_done_B
        )
    if not plan.skips_sort:
        return chosen

    def choose_rest() -> tuple[_Result, jax.Array]:
        return choose_unsorted(), keeps_all_B

    update = functools.partial(_update_rows, choose_rest, keeps_all_B)
    return jax.lax.cond(jnp.any(keeps_all_B), update, lambda *unchanged: unchanged, chosen, is_done_B)[0]


def _update_rows(
    choose: Callable[[], tuple[_Result, jax.Array]], rows_B: jax.Array, chosen: _Result, is_done_B: jax.Array
) -> tuple[_Result, jax.Array]:
    """Replaces the results of rows whose candidates were enough."""
    new, fits_B = choose()
    rows_B = rows_B & fits_B
    return jax.tree.map(lambda new, old: jnp.where(rows_B, new, old), new, chosen), is_done_B | rows_B


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
    return jnp.take_along_axis(x_BK, rank_B[:, None], axis=-1)[:, 0]

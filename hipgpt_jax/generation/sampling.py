"""From logits to a token: bias, penalties, temperature, top-k, top-p, min-p, draw, in this order.

Every operation is an exact identity at its neutral value. Every setting is a traced value, so changing one never
recompiles. ``docs/promise.md`` defines the draw; ``tests/test_sampling.py`` pins the random bits by golden vectors.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hipgpt_jax import config
from hipgpt_jax.generation import topk

_Words = TypeVar("_Words", np.ndarray, jax.Array)

_LARGEST = float(np.finfo(np.float32).max)


class SamplingParams(NamedTuple):
    """Sampling settings of each slot, arrays ``[B]`` and ``[B, V]``; see ``config.SamplingConfig``.

    Attributes:
        bias_BV: Logit bias; minus infinity for tokens that are banned or not allowed.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_penalty_B: jax.Array
    frequency_penalty_B: jax.Array
    presence_penalty_B: jax.Array
    no_repeat_ngram_B: jax.Array
    bias_BV: jax.Array


def sampling_params(settings: Sequence[config.SamplingConfig], V: int) -> SamplingParams:
    """Returns the settings of each slot as arrays, for a vocabulary of ``V``."""

    def column(name: str, dtype: npt.DTypeLike) -> jax.Array:
        return host_array([getattr(one, name) for one in settings], dtype)

    return SamplingParams(
        temperature_B=host_array([min(one.temperature, topk.LARGEST_TEMPERATURE) for one in settings], np.float32),
        top_k_B=host_array([one.top_k if one.top_k < 2**31 else 0 for one in settings], np.int32),  # 0 keeps all too
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        repetition_penalty_B=column("repetition_penalty", np.float32),
        frequency_penalty_B=column("frequency_penalty", np.float32),
        presence_penalty_B=column("presence_penalty", np.float32),
        no_repeat_ngram_B=column("no_repeat_ngram", np.int32),
        bias_BV=host_array(np.stack([_bias(one, V) for one in settings]), np.float32),
    )


def _bias(settings: config.SamplingConfig, V: int) -> np.ndarray:
    bias_V = np.full(V, -np.inf if settings.allow else 0, np.float32)
    bias_V[np.array(settings.allow, int)] = 0
    for token, value in settings.logit_bias:
        bias_V[int(token)] += np.float32(value)
    bias_V[np.array(settings.ban, int)] = -np.inf
    return bias_V


def host_array(values: npt.ArrayLike, dtype: npt.DTypeLike) -> jax.Array:
    """Returns a NumPy array, typed as the JAX array that a jitted function makes of it."""
    return cast(jax.Array, np.asarray(values, dtype))


def threefry2x32(key: tuple[_Words, _Words], block: tuple[_Words, _Words]) -> tuple[_Words, _Words]:
    """Encrypts blocks of two 32-bit words in 20 rounds, as ``jax.random`` does; for NumPy and JAX arrays.

    References:
        Salmon et al., `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_, 2011.
    """
    # jax.random.fold_in of 50257 ids takes 3.0 ms and 0.2 s to compile on a CPU, where JAX rolls the rounds into a
    # loop; this takes 0.33 ms and 0.08 s. It also depends on no JAX setting.
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x0, x1 = block[0] + keys[0], block[1] + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << np.uint32(rotation) | x1 >> np.uint32(32 - rotation))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def fold_in(key: tuple[_Words, _Words], word: _Words) -> tuple[_Words, _Words]:
    """Derives keys from keys and words, as ``jax.random.fold_in`` does."""
    return threefry2x32(key, (word ^ word, word))


def sample_key(seed: int, prompt_ids: Sequence[int], sample: int) -> np.ndarray:
    """Returns the key of a sample, uint32 ``[2]``: the seed's key, with the prompt and the sample's index folded in.

    Args:
        seed: In ``[0, 2**32)``.
        prompt_ids: All ids of the prompt. The first eight bytes of the SHA-256 of the ids as little-endian 32-bit
            words are folded in as two little-endian words.
        sample: Index of the sample, from 0.
    """
    digest = hashlib.sha256(np.asarray(prompt_ids, "<u4").tobytes()).digest()
    words = *np.frombuffer(digest[:8], "<u4").astype(np.uint32), np.uint32(sample)
    key = np.zeros(1, np.uint32), np.array([seed], np.uint32)
    for word in words:
        key = fold_in(key, np.array([word], np.uint32))
    return np.concatenate(key)


def noise(key_B2: jax.Array, index_B: jax.Array, id_BK: jax.Array) -> jax.Array:
    """Returns the exponential noise of candidates, float32 ``[B, K]``; it depends on a candidate's id alone.

    ``-log1p(-u)`` is fine-grained where the noise is small, which decides the draw: its smallest value is 1.2e-10, so
    tokens of probability 1e-9 are sampled at the right rate.

    Args:
        key_B2: Keys of the samples.
        index_B: Index of the token in the sample, from 0.
        id_BK: Ids of the candidates.
    """
    key = fold_in((key_B2[:, 0], key_B2[:, 1]), index_B.astype(jnp.uint32))
    word_BK, _ = fold_in((key[0][:, None], key[1][:, None]), id_BK.astype(jnp.uint32))
    uniform_BK = jnp.minimum((word_BK.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log1p(-uniform_BK)


def ban_repeats(
    logits_BV: jax.Array,
    context_BS: jax.Array,
    length_B: jax.Array,
    params: SamplingParams,
    plan: topk.Plan | None = None,
) -> jax.Array:
    """Bans each token that would repeat an n-gram of the context: its logit becomes minus infinity.

    Where that would ban every token that is left, none is banned.

    Args:
        logits_BV: Logits.
        context_BS: The tokens that the model sees.
        length_B: Their number.
        params: Settings; an n-gram length of 0 is the identity.
        plan: Numbers of candidates. The check is skipped unless a row may ban repeats.
    """
    B, S = context_BS.shape
    ngram_B = params.no_repeat_ngram_B

    def ban(logits_BV: jax.Array) -> jax.Array:
        # Token `p` of the context would be repeated if the `ngram - 1` tokens before it are the last ones. Comparing
        # all at once would take memory for B * S * S numbers in every program.
        p_1S = jnp.arange(S)[None]

        def compare(back: jax.Array, repeats_BS: jax.Array) -> jax.Array:
            last_B1 = jnp.take_along_axis(context_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1)
            is_same_BS = (jnp.roll(context_BS, back, axis=1) == last_B1) & (p_1S >= back)
            return repeats_BS & (is_same_BS | (back >= ngram_B)[:, None])

        may_repeat_BS = (p_1S < length_B[:, None]) & (ngram_B > 0)[:, None]
        repeats_BS = jax.lax.fori_loop(1, jnp.minimum(ngram_B.max(), S + 1), compare, may_repeat_BS)
        is_banned_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(B)[:, None], context_BS].max(repeats_BS)
        banned_BV = jnp.where(is_banned_BV, -jnp.inf, logits_BV)
        return jnp.where(banned_BV.max(axis=-1, keepdims=True) == -jnp.inf, logits_BV, banned_BV)

    if plan is not None and len(plan.buckets) == 1:  # no conditions
        return ban(logits_BV) if plan.bans_repeats else logits_BV
    return jax.lax.cond(jnp.any(ngram_B > 0), ban, lambda unchanged: unchanged, logits_BV)


def penalize(logits_BV: jax.Array, counts_BV: jax.Array, params: SamplingParams) -> jax.Array:
    """Makes tokens that occurred less likely.

    A logit ``l`` becomes ``l / r`` if it is positive and ``l * r`` otherwise, once per distinct token, where ``r`` is
    the repetition penalty; then ``frequency_penalty * count + presence_penalty`` is subtracted.

    Args:
        logits_BV: Logits, float32.
        counts_BV: Occurrences of each token that are penalized.
        params: A repetition penalty of 1 and other penalties of 0 are identities.

    References:
        Keskar et al., `CTRL: A Conditional Transformer Language Model for Controllable Generation
        <https://arxiv.org/abs/1909.05858>`_, 2019.
    """
    repetition_B1 = params.repetition_penalty_B[:, None]
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    penalized_BV = penalized_BV - params.frequency_penalty_B[:, None] * counts_BV.astype(jnp.float32)
    penalized_BV = penalized_BV - params.presence_penalty_B[:, None]
    return jnp.where(counts_BV > 0, penalized_BV, logits_BV)


def scale(logits_BK: jax.Array, highest_B: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Subtracts each row's maximum and divides by the temperature: ``(l - max l) / temperature``.

    Args:
        logits_BK: Logits, float32.
        highest_B: Their maximum.
        temperature_B: At least 0. A temperature of 0 does not divide: only the most likely token is kept then.
    """
    # The maximum is subtracted first, so that no temperature, however small, overflows.
    return (logits_BK - highest_B[:, None]) / _divisor(temperature_B)[:, None]


def is_greedy(temperature_B: jax.Array) -> jax.Array:
    """Returns the rows that take their most likely token: temperature 0, or so small that float32 flushes it to 0."""
    return temperature_B < topk.SMALLEST_TEMPERATURE


def _divisor(temperature_B: jax.Array) -> jax.Array:
    return jnp.where(is_greedy(temperature_B), 1, temperature_B)


class Choice(NamedTuple):
    """The token of each row, and how it was chosen, arrays ``[B]``.

    Attributes:
        token_B: Ids, int32.
        sampled_logprob_B: Log-probability under the sampling settings: among the candidates that are kept, after the
            penalties and the temperature.
        kept_B: Number of candidates that are kept, without banned tokens.
        kept_mass_B: Their probability before the cuts, after the penalties and the temperature.
        lead_B: How far logits must move for another kept candidate to win the draw: the difference of the two highest
            scores, times the temperature. The largest float32 if one candidate is kept. At temperature 0, the
            difference of the two largest logits.
        cut_B: How far logits must move for the token to be cut, or for a candidate that was cut to be kept. If they
            move apart by less, the cuts do not change the token. The largest float32 if neither can happen.
    """

    token_B: jax.Array
    sampled_logprob_B: jax.Array
    kept_B: jax.Array
    kept_mass_B: jax.Array
    lead_B: jax.Array
    cut_B: jax.Array


class _Cut(NamedTuple):
    """The candidates that are kept.

    Attributes:
        num_top_k_B: Number of candidates that top-k keeps; the vocabulary's size if it keeps all.
        num_B: Number of candidates that are kept, at least 1.
        share_BK: Probability, among those that top-k keeps, of each candidate and those before it.
        mass_B: Sum of the weights of the candidates that are kept.
    """

    num_top_k_B: jax.Array
    num_B: jax.Array
    share_BK: jax.Array
    mass_B: jax.Array


def cut(scaled_BK: jax.Array, total_B: jax.Array, params: SamplingParams, V: int) -> _Cut:
    """Keeps the first candidates: by top-k, then top-p, then min-p.

    Top-k keeps exactly ``top_k``. Top-p keeps the fewest of those whose probability reaches ``top_p``; the one that
    crosses the threshold is kept. Min-p keeps those at least ``min_p`` times as likely as the first.

    Args:
        scaled_BK: Scaled logits in descending order. If the cut lies beyond them, all are kept.
        total_B: Sum of the weights of the whole vocabulary.
        params: Settings.
        V: Size of the vocabulary.

    References:
        Holtzman et al., `The Curious Case of Neural Text Degeneration <https://arxiv.org/abs/1904.09751>`_, 2020.
        Nguyen et al., `Turning Up the Heat: Min-p Sampling <https://arxiv.org/abs/2407.01082>`_, 2024.
    """
    K = scaled_BK.shape[1]
    top_k_B = jnp.where(is_greedy(params.temperature_B), 1, params.top_k_B)
    num_top_k_B = jnp.where(top_k_B == 0, V, jnp.minimum(top_k_B, V))
    weight_BK = jnp.exp(scaled_BK)
    mass_BK = jnp.cumsum(weight_BK, axis=-1)
    mass_of_k_B = topk.at_rank(mass_BK, jnp.minimum(num_top_k_B, K) - 1)
    mass_of_k_B = jnp.where(num_top_k_B == V, total_B, mass_of_k_B)
    # All of this is compiled twice, so its operations are as few as can be: a count instead of a search.
    num_top_p_B = 1 + (mass_BK < (params.top_p_B * mass_of_k_B)[:, None]).sum(axis=-1, dtype=jnp.int32)
    num_min_p_B = (weight_BK >= params.min_p_B[:, None]).sum(axis=-1, dtype=jnp.int32)
    num_B = jnp.where(params.top_p_B < 1, jnp.minimum(num_top_k_B, num_top_p_B), num_top_k_B)
    num_B = jnp.where(params.min_p_B > 0, jnp.minimum(num_B, num_min_p_B), num_B)
    num_B = jnp.minimum(num_B, K)
    mass_B = jnp.where(num_B == V, total_B, topk.at_rank(mass_BK, num_B - 1))
    return _Cut(num_top_k_B, num_B, mass_BK / mass_of_k_B[:, None], mass_B)


def choose(
    sorted_BK: jax.Array,
    id_BK: jax.Array,
    key_B2: jax.Array,
    index_B: jax.Array,
    params: SamplingParams,
    highest_B: jax.Array,
    total_B: jax.Array,
    V: int,
) -> Choice:
    """Chooses a token for each row among its candidates.

    Args:
        sorted_BK: Logits of the candidates, in descending order; in any order, if every row keeps the vocabulary.
        id_BK: Their ids.
        key_B2: Keys of the samples.
        index_B: Index of the token in each sample.
        params: Sampling settings.
        highest_B: Largest logit.
        total_B: Sum of the weights of the whole vocabulary.
        V: Size of the vocabulary.

    Returns:
        The choice. It is meaningless for a row whose ``kept_B`` is the number of candidates, but not ``V``.
    """
    scaled_BK = scale(sorted_BK, highest_B, params.temperature_B)
    kept = cut(scaled_BK, total_B, params, V)
    score_BK = scaled_BK - jnp.log(noise(key_B2, index_B, id_BK))
    is_kept_BK = jnp.arange(sorted_BK.shape[1])[None] < kept.num_B[:, None]
    rank_B, token_B, lead_B = _draw(jnp.where(is_kept_BK, score_BK, -jnp.inf), id_BK, params)
    if V > 1:
        greedy_lead_B = jnp.minimum(sorted_BK[:, 0] - sorted_BK[:, 1], _LARGEST)
        lead_B = jnp.where(is_greedy(params.temperature_B), greedy_lead_B, lead_B)
    logprob_B = jnp.minimum(topk.at_rank(scaled_BK, rank_B) - jnp.log(kept.mass_B), 0)
    cut_B = _cut_distance(sorted_BK, scaled_BK, rank_B, kept, params, V)
    return Choice(token_B, logprob_B, kept.num_B, jnp.minimum(kept.mass_B / total_B, 1), lead_B, cut_B)


def _draw(score_BK: jax.Array, id_BK: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the column and the id of the highest score, of the lower id in a tie, and the lead."""
    highest_B1 = score_BK.max(axis=-1, keepdims=True)
    token_B = jnp.where(score_BK == highest_B1, id_BK, jnp.iinfo(jnp.int32).max).min(axis=-1)
    is_token_BK = id_BK == token_B[:, None]
    second_B = jnp.where(is_token_BK, -jnp.inf, score_BK).max(axis=-1)
    lead_B = jnp.minimum((highest_B1[:, 0] - second_B) * _divisor(params.temperature_B), _LARGEST)
    column_BK = jnp.broadcast_to(jnp.arange(id_BK.shape[1], dtype=jnp.int32)[None], id_BK.shape)
    return jnp.where(is_token_BK, column_BK, 0).max(axis=-1), token_B, lead_B


def _cut_distance(
    sorted_BK: jax.Array, scaled_BK: jax.Array, rank_B: jax.Array, kept: _Cut, params: SamplingParams, V: int
) -> jax.Array:
    """Returns ``Choice.cut_B``.

    A share of the probability is a distance of logits, too: its log-odds move as far as the logits of the candidates
    within and beyond it move apart.
    """
    K = sorted_BK.shape[1]
    column_1K = jnp.arange(K)[None]
    has_top_p_B, has_min_p_B = params.top_p_B < 1, params.min_p_B > 0
    divisor_B, top_p_B, log_min_p_B = _divisor(params.temperature_B), _log_odds(params.top_p_B), jnp.log(params.min_p_B)
    next_B = jnp.minimum(kept.num_B, K - 1)  # the first candidate that was cut, if there is one
    own_B, own_next_B = topk.at_rank(sorted_BK, rank_B), topk.at_rank(sorted_BK, next_B)
    has_next_B = (kept.num_B < K) & (own_next_B > -jnp.inf)

    # The token is cut by top-p if the share of those before it reaches the threshold. Those that overtake it count.
    before_rank_B = jnp.where(rank_B > 0, topk.at_rank(kept.share_BK, jnp.maximum(rank_B - 1, 0)), 0)
    own_share_B1 = (topk.at_rank(kept.share_BK, rank_B) - before_rank_B)[:, None]
    reach_BK = (top_p_B[:, None] - _log_odds(kept.share_BK - own_share_B1)) * divisor_B[:, None]
    top_p_BK = jnp.maximum(own_B[:, None] - sorted_BK, reach_BK)
    is_before_BK = (column_1K >= rank_B[:, None]) & (column_1K < kept.num_B[:, None])
    by_top_p_B = jnp.where(is_before_BK, top_p_BK, _LARGEST).min(axis=-1)
    leaves_B = jnp.where(has_top_p_B, by_top_p_B, _LARGEST)
    # The most likely token is below min-p only if the second is above it.
    second_B = topk.at_rank(sorted_BK, jnp.full_like(rank_B, min(1, K - 1)))
    below_second_B = jnp.where(rank_B == 0, own_B - second_B if K > 1 else _LARGEST, 0)
    by_min_p_B = (topk.at_rank(scaled_BK, rank_B) - log_min_p_B) * divisor_B + below_second_B
    leaves_B = jnp.minimum(leaves_B, jnp.where(has_min_p_B, by_min_p_B, _LARGEST))
    # Otherwise the token is cut only if the first candidate that was cut overtakes it.
    is_ordered_B = has_next_B & (has_top_p_B | (kept.num_top_k_B < V))
    leaves_B = jnp.minimum(leaves_B, jnp.where(is_ordered_B, own_B - own_next_B, _LARGEST))

    overtakes_B = topk.at_rank(sorted_BK, kept.num_B - 1) - own_next_B
    enters_B = jnp.where(kept.num_B == kept.num_top_k_B, overtakes_B, 0)
    beyond_B = (_log_odds(topk.at_rank(kept.share_BK, kept.num_B - 1)) - top_p_B) * divisor_B
    enters_B = jnp.maximum(enters_B, jnp.where(has_top_p_B, jnp.minimum(overtakes_B, beyond_B), 0))
    by_min_p_B = (log_min_p_B - topk.at_rank(scaled_BK, next_B)) * divisor_B
    enters_B = jnp.maximum(enters_B, jnp.where(has_min_p_B, by_min_p_B, 0))
    cut_B = jnp.minimum(leaves_B, jnp.where(has_next_B, enters_B, _LARGEST))
    return jnp.where(is_greedy(params.temperature_B), _LARGEST, jnp.clip(cut_B, 0, _LARGEST))


def _log_odds(share: jax.Array) -> jax.Array:
    share = jnp.clip(share, 0, 1 - 2.0**-24)  # sums of float32 numbers may reach or exceed 1
    return jnp.log(share) - jnp.log1p(-share)


def adjust(logits_BV: jax.Array, counts_BV: jax.Array, params: SamplingParams) -> jax.Array:
    """Returns the logits that order the candidates: with penalties. Bias and bans come before, in ``decoding``."""
    logits_BV = penalize(logits_BV.astype(jnp.float32), counts_BV, params)
    return jnp.where(logits_BV == 0, 0, logits_BV)  # to top_k, -0.0 is less than 0.0


def sampled_logprobs(logits_BV: jax.Array, params: SamplingParams, kept_B: jax.Array) -> jax.Array:
    """Returns the log-probability of all tokens under the sampling settings; minus infinity for those that are cut.

    Args:
        logits_BV: From ``adjust``.
        params: Sampling settings.
        kept_B: Number of candidates that are kept; see ``Choice``.
    """
    scaled_BV = scale(logits_BV, logits_BV.max(axis=-1), params.temperature_B)
    rank_BV = jnp.argsort(jnp.argsort(-logits_BV, axis=-1, stable=True), axis=-1)
    kept_BV = jnp.where(rank_BV < kept_B[:, None], scaled_BV, -jnp.inf)
    return jnp.minimum(kept_BV - jnp.log(jnp.exp(kept_BV).sum(axis=-1, keepdims=True)), 0)


def sample(
    logits_BV: jax.Array,
    counts_BV: jax.Array,
    params: SamplingParams,
    key_B2: jax.Array,
    index_B: jax.Array,
    plan: topk.Plan | None = None,
) -> Choice:
    """Chooses a token for each row from as many candidates as the row's settings need.

    Args:
        logits_BV: Logits of the next token, with bias and bans; a banned token's is minus infinity.
        counts_BV: Occurrences of each token that are penalized.
        params: Sampling settings.
        key_B2: Keys of the samples, uint32.
        index_B: Index of the token in each sample, from 0.
        plan: Numbers of candidates; a CPU's by default.
    """
    V = logits_BV.shape[1]
    plan = plan or topk.plan_for(V, "cpu")
    logits_BV = adjust(logits_BV, counts_BV, params)
    highest_B = logits_BV.max(axis=-1)
    total_B = jnp.exp(scale(logits_BV, highest_B, params.temperature_B)).sum(axis=-1)
    finish = functools.partial(
        choose, key_B2=key_B2, index_B=index_B, params=params, highest_B=highest_B, total_B=total_B, V=V
    )
    top_k_B = jnp.where(is_greedy(params.temperature_B), 1, jnp.where(params.top_k_B < V, params.top_k_B, 0))
    cuts_by_mass_B = (params.top_p_B < 1) | (params.min_p_B > 0)
    if not plan.few:
        choice = finish(*topk.candidates(logits_BV, V, chunked=plan.chunked))
    else:
        largest = plan.few[-1]
        # A row without top-k tries whether its other cuts lie within the largest bucket below the vocabulary.
        needed_B = jnp.where((top_k_B == 0) & cuts_by_mass_B, largest, jnp.minimum(top_k_B, largest))
        choice = finish(*topk.few_candidates(logits_BV, plan, needed_B))
        if plan.buckets[-1] == V:
            is_complete_B = (choice.kept_B <= largest) & (top_k_B <= largest) & ((top_k_B > 0) | cuts_by_mass_B)
            needs_order = jnp.any(~is_complete_B & ((top_k_B > 0) | cuts_by_mass_B))

            def choose_among_all(choice: Choice) -> Choice:
                all_BV = topk.all_candidates(logits_BV, needs_order)
                return jax.tree.map(lambda few, new: jnp.where(is_complete_B, few, new), choice, finish(*all_BV))

            choice = jax.lax.cond(jnp.all(is_complete_B), lambda choice: choice, choose_among_all, choice)
    num_allowed_B = (logits_BV > -jnp.inf).sum(axis=-1, dtype=jnp.int32)
    return choice._replace(kept_B=jnp.minimum(choice.kept_B, num_allowed_B))

"""Share of tokens that differ between two numerics, per rule of drawing.

The logits are those of the package's own decode programs, on texts that the run sampled itself (plain sampling).
Contract 1 sorts the candidates by logit and draws with one uniform number per token. Contract 2 is an exponential race,
in which every token id has noise of its own. The minimum for any rule is the mean total variation distance of the two
truncated distributions. The shares depend on the rules and not on the generator, so the random words are those of
NumPy's SFC64, the same in both numerics.

To compare two machines, run with ``--save FILE.npz`` on one and with ``--against FILE.npz`` on the other. The exit code
is 1 if contract 2 changes significantly more tokens than contract 1 in any row.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hipgpt_jax
from hipgpt_jax import config, devices
from hipgpt_jax.runs import weights

# top_k and top_p; the temperature and the repetition penalty are 1.
SETTINGS = {"default": (5, 0.9), "top_p 0.9 only": (0, 0.9), "plain": (0, 1.0)}
_Z = 1.96  # 95 % of a normal distribution lie within as many standard deviations


class Decoder:
    """Teacher-forced decoding by the compiled decode program of a run.

    Attributes:
        run: The run, with its weights, dtype and batch size.
    """

    def __init__(self, run: hipgpt_jax.Run) -> None:
        """Loads the weights."""
        from hipgpt_jax.generation import backends, executables  # they import JAX, which load_run has configured

        self.run, model, decoding = run, run.files.checkpoint.model, run.files.decoding
        backend = backends.backend_for(run.device.platform, model, run.files.window, decoding.batch_size)
        attention = run.device.attention(decoding.dtype, model.head_dim)
        self._programs = executables.Executables(
            model, decoding.dtype, run.files.window, decoding.window_stride, attention, backend
        )
        self._programs.load(weights.read(run.files.checkpoint.weights, model))

    def logits(self, ids_RT: np.ndarray) -> np.ndarray:
        """Returns the logits ``[R, T, V]`` after each token of ``R`` texts, which fill whole batches."""
        num_slots = self._programs.backend.num_slots
        return np.concatenate([self._decode(part) for part in np.split(ids_RT, len(ids_RT) // num_slots)])

    def _decode(self, ids_BT: np.ndarray) -> np.ndarray:
        from hipgpt_jax.generation import decoding, executables

        programs, (B, T) = self._programs, ids_BT.shape
        logits_BTV = np.empty((B, T, programs.model.vocab_size), np.float32)
        state: Any = programs.blank_state()._replace(eos_B=np.full(B, -1, np.int32))  # no token ends a text
        blocks: Any = ()
        for t in range(T):
            num_blocks, _ = programs.backend.plan_steps(t)
            blocks += programs.empty_blocks(len(blocks), num_blocks)
            cache = programs.backend.split(blocks)
            # The limit stops the program after one step. The token that it samples is replaced by the text's own.
            limit_B, token_B = np.full(B, t + 1, np.int32), np.ascontiguousarray(ids_BT[:, t])
            state = state._replace(limit_B=limit_B, token_B=token_B, cache=cache._replace(frozen=()))
            program = executables.Program("decode", blocks=num_blocks)
            state, output = programs.run(program, programs.params, state, cache.frozen)
            blocks = (*cache.frozen, *state.cache.writable)
            state = state._replace(cache=decoding.NO_CACHE)
            logits_BTV[:, t] = np.asarray(output.logits_BV[0])
        return logits_BTV


def sample_texts(run: hipgpt_jax.Run, count: int, seed: int) -> np.ndarray:
    """Returns the ids ``[R, W]`` of texts that the run samples after a line break, by plain sampling."""
    num_tokens = run.files.window - len(run.files.vocabulary.encode("\n"))
    settings = config.SamplingConfig(top_k=0, top_p=1.0, repetition_penalty=1.0)
    records = run.generate("\n", settings, seed, count, num_tokens=num_tokens, eos_id=-1)
    return np.array([(*record.prompt_ids, *record.ids) for record in records], np.int32)


class Draws(NamedTuple):
    """Tokens drawn from the logits of one text, and the distributions that they were drawn from.

    Attributes:
        tokens: Ids ``[settings, rules, D, T]`` of ``D`` draws, contract 1 before contract 2.
        probabilities: Truncated distributions ``[settings, T, V]``.
    """

    tokens: np.ndarray
    probabilities: np.ndarray


def draw(logits_TV: np.ndarray, uniform_DT: np.ndarray, gumbel_DTV: np.ndarray) -> Draws:
    """Draws tokens by both rules.

    Args:
        logits_TV: Logits, float32.
        uniform_DT: Contract 1's uniform number per draw and token, in [0, 1).
        gumbel_DTV: Contract 2's noise per draw, token and id: ``-log(e)`` of an exponential ``e``.
    """
    (T, V), rows_T = logits_TV.shape, np.arange(len(logits_TV))
    order_TV = _order(logits_TV)
    rank_TV = np.empty_like(order_TV)
    np.put_along_axis(rank_TV, order_TV, np.arange(V)[None], axis=-1)
    shifted_TV = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    weights_TV = np.exp(shifted_TV)
    sums_TV = np.cumsum(np.take_along_axis(weights_TV, order_TV, axis=-1), axis=-1, dtype=np.float32)
    tokens, probabilities = np.empty((len(SETTINGS), 2, len(uniform_DT), T), np.int32), np.empty((len(SETTINGS), T, V))
    for index, (top_k, top_p) in enumerate(SETTINGS.values()):
        kept_T = np.full(T, min(top_k or V, V))
        if top_p < 1:
            kept_T = 1 + np.argmax(sums_TV >= np.float32(top_p) * sums_TV[rows_T, kept_T - 1, None], axis=-1)
        is_kept_TV = rank_TV < kept_T[:, None]
        kept_TV = np.where(is_kept_TV, shifted_TV, -np.inf)
        for number, (uniform_T, gumbel_TV) in enumerate(zip(uniform_DT, gumbel_DTV, strict=True)):
            drawn_T = np.argmax(sums_TV > (uniform_T * sums_TV[rows_T, kept_T - 1])[:, None], axis=-1)
            tokens[index, 0, number] = order_TV[rows_T, drawn_T]
            tokens[index, 1, number] = np.argmax(kept_TV + gumbel_TV, axis=-1)
        probabilities[index] = np.where(is_kept_TV, weights_TV, 0)
        probabilities[index] /= probabilities[index].sum(axis=-1, keepdims=True)
    return Draws(tokens, probabilities)


def _order(logits_TV: np.ndarray) -> np.ndarray:
    """Returns the ids by descending logit; ties go to the lower id."""
    # Sorting integers of the logit's order and the id is ten times as fast as a stable argsort of 5000 logits.
    bits_TV = (logits_TV + np.float32(0)).view(np.int32)  # the sum turns -0.0 into 0.0
    ascending_TV = np.where(bits_TV < 0, bits_TV ^ 0x7FFFFFFF, bits_TV).astype(np.int64)
    return np.sort(-ascending_TV * 2**32 + np.arange(logits_TV.shape[1]), axis=-1) & 0xFFFFFFFF


def noise(seed: Sequence[int], D: int, T: int, V: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the random numbers of ``D`` draws of a text: contract 1's ``[D, T]`` and contract 2's ``[D, T, V]``."""
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
    uniform_DT = rng.integers(2**24, size=(D, T)).astype(np.float32) * np.float32(2**-24)
    words_DTV = rng.integers(2**32, size=(D, T, V), dtype=np.uint32).astype(np.float32)
    u_DTV = np.minimum((words_DTV + np.float32(0.5)) * np.float32(2**-32), np.float32(1 - 2**-24))
    return uniform_DT, -np.log(-np.log1p(-u_DTV))


class Difference(NamedTuple):
    """Difference between two numerics over one text.

    Attributes:
        changed: Number of tokens that differ ``[settings, rules]``.
        distance: Sum of the total variation distances ``[settings]``.
        squares: Sum of the squared differences of the logits.
    """

    changed: np.ndarray
    distance: np.ndarray
    squares: float


def compare(
    logits: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]], seed: Sequence[int], num_draws: int
) -> list[Difference]:
    """Compares pairs of numerics, as indices into the logits ``[T, V]`` of a text under each of them."""
    random = noise(seed, num_draws, *logits[0].shape)
    draws = [draw(logits_TV, *random) for logits_TV in logits]
    return [
        Difference(
            (draws[a].tokens != draws[b].tokens).sum(axis=(2, 3)),
            np.abs(draws[a].probabilities - draws[b].probabilities).sum(axis=(1, 2)) / 2,
            float(np.square(logits[a] - logits[b], dtype=np.float64).sum()),
        )
        for a, b in pairs
    ]


def interval(counts: np.ndarray, trials: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share, widened by the variance between texts.

    Args:
        counts: Successes per text.
        trials: Trials per text.
    """
    n, share = trials * len(counts), counts.sum() / (trials * len(counts))
    if 0 < share < 1 and len(counts) > 1:
        n /= max(1.0, float(counts.var(ddof=1)) / (trials * share * (1 - share)))
    center, scale = share + _Z**2 / (2 * n), 1 + _Z**2 / n
    radius = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, float((center - radius) / scale)), float((center + radius) / scale)


def print_table(differences: dict[str, list[Difference]], vocab_size: int, trials: int, num_draws: int) -> bool:
    """Prints the table; returns whether contract 2 is significantly worse than contract 1 in a row.

    Args:
        differences: Differences per text, by the names of the numerics.
        vocab_size: Size of the vocabulary.
        trials: Draws per text.
        num_draws: Draws per position.
    """
    print("| numerics | logits differ by (rms) | settings | contract 1 | contract 2 | minimum for any rule |")
    print("|---|--:|---|--:|--:|--:|")
    worse = False
    for name, texts in differences.items():
        positions = len(texts) * trials // num_draws
        rms = np.sqrt(sum(text.squares for text in texts) / (positions * vocab_size))
        for index, settings in enumerate(SETTINGS):
            cells: list[str] = []
            bounds: list[tuple[float, float]] = []
            for rule in (0, 1):
                counts = np.array([text.changed[index, rule] for text in texts])
                low, high = interval(counts, trials)
                share = counts.sum() / (trials * len(texts))
                cells.append(f"{_percent(share)} % [{_percent(low)}, {_percent(high)}], {counts.sum()}")
                bounds.append((low, high))
            least = sum(text.distance[index] for text in texts) / positions
            print(f"| {name} | {rms:.2g} | {settings} | {' | '.join(cells)} | {_percent(least)} % |", flush=True)
            worse |= bounds[1][0] > bounds[0][1]
    return worse


def _percent(share: float) -> str:
    return np.format_float_positional(100 * share, precision=3, fractional=False, trim="-")


def main(arguments: Sequence[str]) -> int:
    """Measures the pairs, prints the table and returns the exit code."""
    options = _parser().parse_args(arguments)

    def load(
        dtype: str = options.dtype, batch_size: int = options.batch_size, step: int | None = options.step
    ) -> Decoder:
        decoding = config.DecodingConfig(dtype=dtype, batch_size=batch_size)
        return Decoder(hipgpt_jax.load_run(options.run_name, step, options.device, decoding))

    sizes = sorted({int(size) for size in options.batch_sizes.split(",")} - {options.batch_size})
    decoders = [load(), *(load(batch_size=size) for size in sizes)]
    base, largest = decoders[0], decoders[-1]
    files, device = base.run.files, base.run.device
    digest, vocab_size = files.checkpoint.weights_sha256, files.checkpoint.model.vocab_size
    group = int(np.lcm.reduce([options.batch_size, *sizes]))  # texts that fill whole batches of every size
    saved = np.load(options.against) if options.against else None
    if saved is not None and str(saved["weights"]) != digest:
        print(f"compare_draws: error: {options.against} is of other weights", file=sys.stderr)
        return 1
    count = group * -(-options.positions // (group * files.window))
    ids_RT = saved["ids"] if saved is not None else sample_texts(largest.run, count, options.seed)
    if options.save:
        np.savez(
            options.save, ids=ids_RT, logits=base.logits(ids_RT), weights=np.array(digest), device=np.array(str(device))
        )
        return 0

    if saved is not None:
        decoders, pairs = [base], {f"{saved['device'].item()} → {device}": (0, 1)}
    else:
        pairs = {f"batch size {options.batch_size} → {size}": (0, index) for index, size in enumerate(sizes, 1)}
        # A large batch decodes fastest.
        at = f"batch size {largest.run.files.decoding.batch_size}"
        if options.dtype != "bfloat16":
            pairs[f"{options.dtype} → bfloat16, {at}"] = (len(sizes), len(decoders))
            decoders.append(load(dtype="bfloat16", batch_size=largest.run.files.decoding.batch_size))
        if options.other_step is not None:
            pairs[f"step {files.checkpoint.step} → {options.other_step}, {at}"] = (len(sizes), len(decoders))
            decoders.append(load(step=options.other_step, batch_size=largest.run.files.decoding.batch_size))
    differences: dict[str, list[Difference]] = {name: [] for name in pairs}
    for start in range(0, len(ids_RT), group):
        ids_GT = ids_RT[start : start + group]
        logits = [saved["logits"][start : start + group]] if saved is not None else []
        logits += [decoder.logits(ids_GT) for decoder in decoders]
        for row in range(len(ids_GT)):
            seed = (options.seed, start + row)
            found = compare([each[row] for each in logits], list(pairs.values()), seed, options.draws)
            for name, difference in zip(pairs, found, strict=True):
                differences[name].append(difference)
        print(f"compare_draws: {start + len(ids_GT)} of {len(ids_RT)} texts", file=sys.stderr, flush=True)
    print(f"{options.run_name} (V {vocab_size}, W {files.window}) on {device}: {ids_RT.size} positions, ", end="")
    print(f"{options.draws} draws each\n")
    if worse := print_table(differences, vocab_size, files.window * options.draws, options.draws):
        print("compare_draws: CONTRACT 2 CHANGES MORE TOKENS THAN CONTRACT 1", file=sys.stderr)
    return int(worse)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_name", default="shakespeare", help="run (%(default)s)")
    parser.add_argument("--step", type=int, help="step of the base; the latest if absent")
    parser.add_argument("--other_step", type=int, help="step to compare the base with")
    parser.add_argument("--dtype", choices=config.DTYPES, default="float32", help="of the base (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="of the base (%(default)s)")
    parser.add_argument("--batch_sizes", default="2,8,16,64", help="to compare the base with (%(default)s)")
    parser.add_argument("--positions", type=int, default=50_000, help="least number of positions (%(default)s)")
    parser.add_argument("--draws", type=int, default=6, help="draws per position (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and the noise (%(default)s)")
    parser.add_argument("--device", choices=devices.DEVICES, default="auto", help="(%(default)s)")
    parser.add_argument("--save", type=Path, help="only write texts and logits of the base to this .npz file")
    parser.add_argument("--against", type=Path, help="compare only with the logits in this .npz file")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A reproducible experiment: what does a lower temperature cost in variety, and gain in likelihood?

The samples are paired: with one seed, all temperatures share their noise. Finished conditions are kept as record files,
so a killed experiment continues, and a part of all records is generated again at the end. From any directory:

  python experiment.py
"""

import math
import statistics
from pathlib import Path

import hipgpt_jax

TEMPERATURES = (1.0, 0.8, 0.6)  # the first is the reference
PROMPTS = ("ROMEO:", "JULIET:", "First Citizen:", "KING RICHARD III:")
SAMPLES, TOKENS, SEED = 8, 64, 2024
FOLDER = Path("experiment")


def condition(run: hipgpt_jax.Run, temperature: float) -> list[hipgpt_jax.Record]:
    """Returns the records of a temperature, from their file if the condition is finished."""
    path = FOLDER / f"temperature_{temperature}.jsonl"
    if not path.exists():
        settings = hipgpt_jax.SamplingConfig(temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0)
        made = run.records(PROMPTS, settings, seed=SEED, num_samples=SAMPLES, num_tokens=TOKENS)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{each.to_json()}\n" for each in made), encoding="utf-8")
        partial.rename(path)
    return list(hipgpt_jax.read_records(path))


def bits_per_token(sample: hipgpt_jax.Record) -> float:
    """Mean surprisal of a sample under the model itself, at temperature 1."""
    return -statistics.mean(sample.logprobs) / math.log(2)


def distinct_pairs(sample: hipgpt_jax.Record) -> float:
    """Share of pairs of neighbouring tokens that occur once or for the first time."""
    pairs = list(zip(sample.ids, sample.ids[1:], strict=False))
    return len(set(pairs)) / len(pairs)


def main() -> None:
    """Runs the experiment and prints its table."""
    FOLDER.mkdir(exist_ok=True)
    run = hipgpt_jax.load_run("shakespeare", decoding=hipgpt_jax.DecodingConfig(batch_size=SAMPLES))
    results = {temperature: condition(run, temperature) for temperature in TEMPERATURES}
    for measure in (bits_per_token, distinct_pairs):
        print(f"{measure.__name__}, and its paired difference from temperature {TEMPERATURES[0]} ± standard error")
        reference = [measure(each) for each in results[TEMPERATURES[0]]]
        for temperature, records in results.items():
            values = [measure(each) for each in records]
            differences = [value - other for value, other in zip(values, reference, strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            print(f"  {temperature}  {statistics.mean(values):.3f}  {statistics.mean(differences):+.3f} ± {error:.3f}")
    checked = [each for records in results.values() for each in records[:: len(PROMPTS)]]
    again = run.records_of(map(run.request_of, checked))
    identical = sum(run.compare(old, new).is_identical for old, new in zip(checked, again, strict=True))
    print(f"replayed {identical} of {len(checked)} records identically")


if __name__ == "__main__":
    main()

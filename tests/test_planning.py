"""Plans: prompts checked, counted and resolved, without holding them."""

import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import records

from hipgpt_jax import config
from hipgpt_jax.records import planning, writer
from hipgpt_jax.runs import loading
from hipgpt_jax.text import prompts

SAMPLING = config.SamplingConfig()


class Many:
    """Prompts that are generated while they are read."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __iter__(self) -> Iterator[prompts.Prompt]:
        return (prompts.Prompt(text=f"text {number}", id=f"p{number}") for number in range(self._number))


@pytest.fixture(scope="module")
def found() -> loading.RunFiles:
    return loading.open_run("shakespeare", None, config.DecodingConfig())


def plan_of(
    found: loading.RunFiles, several: Any, out: writer.RecordFile | None = None, **generation: Any
) -> planning.Plan:
    return planning.Plan(found, several, SAMPLING, config.GenerationConfig(**generation), out)


def record_of(found: loading.RunFiles, prompt: prompts.Prompt, sample: int, **generation: Any) -> Any:
    """Returns a record with the settings of a plan."""
    asked = config.GenerationConfig(**generation)
    base = records.make_record()
    own = {"num_tokens": asked.num_tokens, "eos_id": asked.eos_id, "stop": asked.stop, "top_logprobs": 0}
    values = {**vars(base.settings), **vars(SAMPLING), **own}
    return records.make_record(
        id=prompt.name,
        sample=sample,
        seed=asked.seed,
        prompt=prompt.text,
        prompt_ids=found.encode(prompt),
        settings=type(base.settings)(**values),
    )


def test_a_billion_samples_take_no_memory_or_time(found: loading.RunFiles, tmp_path: Path) -> None:
    out = writer.RecordFile(tmp_path / "a.jsonl")
    began = time.process_time()
    tracemalloc.start()
    plan = plan_of(found, [prompts.Prompt(text="ROMEO:")], out, num_samples=10**9)
    (asked,) = plan
    assert asked.samples is not None
    first = next(iter(asked.samples))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    out.close()
    assert (plan.prompts, plan.samples, plan.left, first) == (1, 10**9, 10**9, 0)
    assert peak < 200_000  # the set of all keys took 156 bytes per sample
    assert time.process_time() - began < 5


def test_memory_does_not_grow_with_the_prompts(found: loading.RunFiles) -> None:
    peaks = []
    for number in (100, 10_000):
        tracemalloc.start()
        plan = plan_of(found, Many(number))
        assert plan.samples == number
        assert next(iter(plan)).prompt == "text 0"
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 80 * 10_000  # 4 kB for each, when all were resolved first


def test_finished_samples_are_skipped(found: loading.RunFiles, tmp_path: Path) -> None:
    one, other = prompts.Prompt(text="ROMEO:"), prompts.Prompt(text="JULIET:")
    out = writer.RecordFile(tmp_path / "a.jsonl")
    for sample in (0, 1, 4):
        out.append(record_of(found, one, sample, num_samples=6))
    out.close()
    again = writer.RecordFile(tmp_path / "a.jsonl")
    plan = plan_of(found, [one, other, one], again, num_samples=6)
    assert (plan.prompts, plan.repeated, plan.samples, plan.left) == (3, 1, 12, 9)
    asked = [(each.prompt, list(each.samples or ())) for each in plan]
    assert asked == [("ROMEO:", [2, 3, 5]), ("JULIET:", [0, 1, 2, 3, 4, 5])]
    with pytest.raises(ValueError, match=r"made by other settings: seed 0 in sample 0 of \w+, 1 now"):
        plan_of(found, [one], again, num_samples=6, seed=1)
    again.close()


@pytest.mark.parametrize(
    ("several", "generation", "message"),
    [
        ([prompts.Prompt(text="a"), prompts.Prompt(text="")], {}, "prompt 2 .*: the prompt is empty"),
        ([prompts.Prompt(text="")], {}, "^the prompt is empty"),
        ([prompts.Prompt(text="a")], {"eos_id": 1024}, "eos_id must be -1 or below the vocabulary's size 1024"),
        (
            [prompts.Prompt(text="a"), prompts.Prompt(text="b", generation={"eos_id": 5000})],
            {},
            "prompt 2 .*: eos_id must be -1 or below",
        ),
    ],
)
def test_all_prompts_are_checked_first(
    found: loading.RunFiles, several: list[prompts.Prompt], generation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(found, several, **generation)


@pytest.mark.parametrize("width", [10**9, 10**30])
def test_a_width_beyond_the_memory_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be smaller: 1000.* slots need at least .* GiB of memory"):
        loading.open_run("shakespeare", None, config.DecodingConfig(batch_size=width))


def test_a_name_takes_a_few_bytes() -> None:
    names = planning.NameIndex()
    tracemalloc.start()
    for number in range(20_000):
        names.add(prompts.Prompt(text=f"text {number % 19_000}"))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 16 * 20_000
    number, repeated = names.repeated()
    assert (number, len(repeated)) == (1000, 1000)


def test_one_id_for_two_prompts_is_refused(found: loading.RunFiles) -> None:
    one, other = prompts.Prompt(text="a", id="x"), prompts.Prompt(text="b", id="x")
    plan_of(found, [one, one])
    with pytest.raises(ValueError, match="prompt 2: id 'x' is that of prompt 1 too"):
        plan_of(found, [one, other])


def test_an_id_occurs_once_in_a_file(found: loading.RunFiles, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "x"}\n\n{"prompt": "a", "id": "x"}')
    with pytest.raises(ValueError, match=r"p\.jsonl line 3: id 'x' is that of line 1 too"):
        plan_of(found, prompts.PromptFile(tmp_path / "p.jsonl"))

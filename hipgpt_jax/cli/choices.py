"""``hipgpt-evaluate --choices``: log-probabilities of the texts that may follow a prompt."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from hipgpt_jax import api, config, json_files
from hipgpt_jax.cli import program
from hipgpt_jax.runs import loading
from hipgpt_jax.text import documents, prompts

if TYPE_CHECKING:
    from hipgpt_jax.evaluation import score

COLUMNS = ("logprob", "per_token", "per_byte")

_TEXT = {"type": "string", "minLength": 1}
_SCHEMA = json_files.Schema(
    "line of choices",
    {
        "type": "object",
        "required": ["choices"],
        "additionalProperties": False,
        "properties": {
            "id": _TEXT,
            "prompt": {"type": "string"},
            "prompt_ids": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "choices": {"type": "array", "minItems": 2, "items": _TEXT},
        },
    },
)


class Question(NamedTuple):
    """A prompt, and the texts that may follow it."""

    prompt: prompts.Prompt
    choices: list[str]


def read(path: Path, source: loading.RunFiles) -> list[Question]:
    """Reads a file of JSON lines with ``choices``, ``prompt`` or ``prompt_ids``, and optionally ``id``.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not valid, the run cannot take its prompt, or there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"choices file not found: {path}")
    if path.is_dir():
        raise IsADirectoryError(f"choices file {path} is a directory: give a file in it")
    questions = list(_parse(path, source))
    if not questions:
        raise ValueError(f"{path} has no choices: it needs at least one JSON line with a prompt and choices")
    return questions


def _parse(path: Path, source: loading.RunFiles) -> Iterator[Question]:
    for line in json_files.read_lines(path, prompts.MAX_LINE_BYTES):
        where = f"{path} line {line.number}"
        try:
            value = json_files.parse(line.text.strip())
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        _SCHEMA.check(value, where)
        text, ids = value.get("prompt"), value.get("prompt_ids")
        if (text is None) == (ids is None):
            raise ValueError(f"{where} needs either prompt, a text, or prompt_ids, a list of token ids")
        try:
            text = documents.without_surrogates(text or "")
            prompt = prompts.Prompt(text=text, ids=ids, id=value.get("id"), location=where)
            source.check_prompt(prompt)
            choices = list(map(documents.without_surrogates, value["choices"]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield Question(prompt, choices)


def write(run: api.Run, questions: Sequence[Question], out: TextIO | None, *, shows_table: bool) -> None:
    """Scores choices, and writes a line of JSON, rows of a table, or both for each question."""
    for prompt, choices in questions:
        scores = run.score_choices(prompt, choices)
        best = {name: _best(scores, name) for name in COLUMNS}
        if out is not None:
            line = {
                "id": prompt.name,
                "prompt": run.files.vocabulary.decode(ids := run.files.encode(prompt)),
                "prompt_ids": ids,
                "choices": [_describe(one) for one in scores],
                "best": best,
                "window": run.files.window,
                **run.recorder.common_fields(),
            }
            out.write(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
            out.flush()
        if shows_table:
            print(f"{program.printable(prompt.name)}: {len(scores)} choices; * marks the best of a column")
            print("  " + "".join(f"{name.replace('_', ' '):>12}" for name in COLUMNS))
            for number, one in enumerate(scores):
                cells = (f"{getattr(one, name):11.4f}{'*' if best[name] == number else ' '}" for name in COLUMNS)
                print(f"  {''.join(cells)} {program.printable(config.shortened(one.text))}")


def _best(scores: "Sequence[score.ChoiceScore]", name: str) -> int:
    """Returns the index of the highest value in a column; the first of equal ones."""
    return max(range(len(scores)), key=lambda number: getattr(scores[number], name))


def _describe(one: "score.ChoiceScore") -> dict[str, Any]:
    return {"text": one.text, "ids": one.ids, **{name: getattr(one, name) for name in COLUMNS}}

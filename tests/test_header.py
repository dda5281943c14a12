"""Headers of records: the fast parser of written lines against the strict one."""

import dataclasses
import json
import random
import re
from typing import Any

import pytest
import records
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.records import header, record

NASTY = 'a "quoted" \\ text,"settings":{"x":1},\n\x00\x7f\u2028 🙂 [1,2]'
WRITTEN = [
    records.make_record(),
    records.make_record(sample=config.MAX_SAMPLES - 1, seed=config.MAX_SEED, argv=(), ids=(), logprobs=()),
    records.make_record(id=NASTY, prompt=NASTY, text=NASTY, tokens=(NASTY, ""), stop=NASTY, error=NASTY, argv=(NASTY,)),
    records.make_record(settings=dataclasses.replace(records.SETTINGS, logit_bias=((3, -1e-7),), stop=(NASTY,))),
    records.make_record(timings=record.Timings(load=1e-7, first_token=None, total=1e22)),
    records.babble(40, 1),
]
# Numbers per token, of which the fast parser checks the characters alone.
NUMBERS = re.compile(rb'"(%s)":\[[-+.,e0-9]*\]' % "|".join(record.STATISTICS).encode())


def check(line: bytes) -> bool:
    """Returns whether the fast parser accepts a line; what it accepts, the strict one reads as the same."""
    fast = header._parse_written(line)
    if fast is not None:
        assert fast == header._parse_any(NUMBERS.sub(rb'"\1":[]', line), "it")
    return fast is not None


@pytest.mark.parametrize("made", WRITTEN)
def test_written_lines_are_parsed_fast(made: record.Record) -> None:
    line = made.to_json().encode()
    assert check(line)
    assert check(line + b"\n")
    one = header.parse(line, "it")
    assert one == header.Header(*(getattr(made, name) for name in header.Header._fields))


@pytest.mark.parametrize("seed", range(4))
def test_changed_values_are_read_as_by_the_strict_parser(seed: int) -> None:
    draw = random.Random(seed)
    values = [json.loads(one.to_json()) for one in WRITTEN]
    accepted = sum(check(records.mutated(draw.choice(values), draw, separators=(",", ":"))) for _ in range(500))
    assert 50 < accepted < 400


@given(
    st.sampled_from(WRITTEN),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 3),
    st.lists(st.sampled_from([*b'"\\{}[],:019.e-+n \n\x00\x1f\xc3\xa9u']), max_size=4).map(bytes),
)
@settings(deadline=None, derandomize=True, database=None, max_examples=400)
def test_changed_bytes_are_read_as_by_the_strict_parser(
    made: record.Record, place: float, removed: int, added: bytes
) -> None:
    line = made.to_json().encode()
    at = int(place * len(line))
    check(line[:at] + added + line[at + removed :] + b"\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sample":0', '"sample":0.0'),
        ('"sample":0', '"sample":00'),
        ('"sample":0', '"sample":4294967296'),
        ('"seed":7', '"seed":-7'),
        ('"seed":7', '"seed":7,"seed":8'),
        ('"id":"p1"', '"id":""'),
        ('"id":"p1"', '"id":"\\ud800"'),
        ('"prompt_ids":[3,4]', '"prompt_ids":[3,4.0]'),
        ('"prompt_ids":[3,4]', '"prompt_ids":[3,,4]'),
        ('"temperature":1.0', '"temperature":NaN'),
        ('"temperature":1.0', '"temperature":1e400'),
        ('"top_k":5', '"top_k":5.0'),
        ('"top_k":5', '"top_k":5,"top_k":6'),
        ('"run":{', '"run":{},"run":{'),
        ('"argv":', '"seed":8,"argv":'),
        ('"started":"2', '"started":"2"},"a":{"b":"'),
        ('"text":" or not"', '"text":" or\n not"'),
        ('"top_logprobs":null', '"top_logprobs":[[[1,NaN," or"]]]'),
        ('"schema":2', '"schema":1'),
    ],
)
def test_refused_values_are_not_parsed_fast(old: str, new: str) -> None:
    line = WRITTEN[0].to_json()
    assert old in line
    assert not check(line.replace(old, new, 1).encode())


def test_a_long_line_of_something_else_is_refused_at_once() -> None:
    beginning = WRITTEN[0].to_json().partition('"prompt_dropped"')[0]
    for value in ('"a",', "1,", "[1,", '[[1,2,"a"],'):
        line = f'{beginning}"prompt_dropped":0,"ids":[],"tokens":[{value * 100_000}'
        assert header._parse_written(line.encode()) is None


def test_the_pattern_has_all_fields_in_order() -> None:
    names: list[Any] = re.findall(r'"(\w+)":', header._written_line().pattern)
    fields = [field.name for field in dataclasses.fields(record.Record)]
    own = [name for name in names if name in ("schema", "contract", *fields)]
    middle = ["run", "numerics", "versions", "argv", "started"]  # parsed by the strict parser
    assert own == ["schema", "contract", *(name for name in fields if name not in middle)]

"""From tokens to text: pieces, stop strings and ends, whatever runs beside."""

import dataclasses
import itertools
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import fakes
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import events, sampler, samples
from hipgpt_jax.text import tokenizer

# Ids of MODEL stand for bytes from "U" on, so that the text has letters and, from 128 - 85 on, broken UTF-8.
VOCABULARY = tokenizer.Tokenizer.train([], 256)


class Shifted(tokenizer.Tokenizer):
    """Bytes from 85 on: a model of 150 ids writes letters and every continuation byte."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(85 + token_id for token_id in ids)


SHIFTED = Shifted(VOCABULARY._backend)


def jobs(count: int, **changes: Any) -> list[samples.Job]:
    stop = changes.pop("stop", ())
    made = []
    for i in range(count):
        request = fakes.request(
            fakes.prompt(i + 1), sample=i, **{"num_tokens": 30, "top_k": 0, "top_p": 1.0, **changes}
        )
        request = dataclasses.replace(request, generation=dataclasses.replace(request.generation, stop=stop))
        made.append(samples.Job(id=str(i), prompt="", request=request))
    return made


def made(wanted: list[samples.Job], width: int = 3) -> list[samples.Sample]:
    updates = list(samples.make(fakes.make_sampler(width=width), SHIFTED, wanted, measure=True))
    ended = sorted((update for update in updates if update.finish_reason is not None), key=lambda update: update.index)
    for update in ended:
        pieces = [one.text for one in updates if one.index == update.index]
        assert "".join(pieces) == update.sample.text
    return [update.sample for update in ended]


def test_tokens_joined_are_the_text_and_the_decoded_ids() -> None:
    found = made(jobs(5))
    for one in found:
        assert "".join(one.tokens) == one.text == SHIFTED.decode(one.ids)
        assert len(one.tokens) == len(one.ids) == 30
    assert any("\ufffd" in one.text for one in found)
    assert any("" in one.tokens for one in found), "a character over two tokens"


def test_a_stop_string_cuts_the_text_and_ends_the_sample() -> None:
    """Every string of up to four characters that occurs is tried: alone in width and beside others."""
    plain = made(jobs(4))
    for row, start in itertools.product(range(4), (0, 5, 11)):
        for length in (1, 2, 4):
            string = plain[row].text[start : start + length]
            for one, before in zip(made(jobs(4, stop=(string, "never"))), plain, strict=True):
                assert one.ids == before.ids[: len(one.ids)]
                assert string not in one.text
                if string in before.text:
                    assert (one.finish_reason, one.stop) == ("stop", string)
                    assert one.text == before.text[: before.text.index(string)]
                    assert "".join(one.tokens).startswith(one.text + string)
                else:
                    assert (one.finish_reason, one.stop, one.text) == ("length", None, before.text)


def test_the_end_token_is_drawn_and_says_nothing() -> None:
    (plain,) = made(jobs(1))
    eos_id = plain.ids[9]
    (one,) = made(jobs(1, eos_id=eos_id))
    end = plain.ids.index(eos_id)
    assert one.ids == plain.ids[: end + 1]
    assert one.finish_reason == "eos"
    assert one.tokens[-1] == ""
    assert one.text == SHIFTED.decode(one.ids[:-1])


def test_nothing_asked_for_is_an_empty_sample() -> None:
    (one,) = made(jobs(1, num_tokens=0))
    assert (one.ids, one.tokens, one.text, one.finish_reason, one.first_token) == ([], [], "", "length", None)


def test_weights_that_are_no_good_give_an_error_and_no_text() -> None:
    params = fakes.random_params(fakes.MODEL)
    params["ln_f"]["bias"][0] = np.inf
    broken = sampler.Sampler(fakes.MODEL, params, config.DecodingConfig(window=11))
    (update,) = samples.make(broken, SHIFTED, jobs(1), measure=True)
    assert (update.finish_reason, update.text, update.drew) == ("error", "", False)
    assert update.sample.error == "the model's numbers are not finite at token 0: its weights are no good"


@pytest.mark.parametrize("width", [1, 3])
def test_updates_are_put_in_order(width: int) -> None:
    updates = samples.make(fakes.make_sampler(width=width), SHIFTED, jobs(5), measure=False)
    order = [update.index for update in events.in_order(updates)]
    assert order == sorted(order)
    assert order.count(0) == 30


def test_a_streamed_sample_keeps_none_of_its_tokens() -> None:
    """A text that nothing records may be longer than memory holds."""

    class Endless:
        def __init__(self, number: int) -> None:
            self._number = number

        def run(self, requests: Iterable[events.Request], *, measure: bool = False) -> Iterator[events.Event]:
            (request,) = requests
            assert request.ends is not None
            for number in range(self._number):
                request.ends(65)
                yield events.Event(index=0, token=65, finish_reason="length" if number == self._number - 1 else None)

    vocabulary = tokenizer.Tokenizer.train([], 256)
    job = samples.Job(id="p", prompt="a", request=fakes.request())
    peaks = []
    for number in (1_000, 20_000):
        tracemalloc.start()
        count = sum(len(update.text) for update in samples.make(Endless(number), vocabulary, [job], measure=False))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == number
    assert peaks[1] - peaks[0] < 10_000

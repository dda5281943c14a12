"""Tests of sequences: text pieces, stop strings and finish reasons, whatever the other slots hold."""

import itertools
import tracemalloc
from typing import Any

import fakes
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import requests, scheduler
from hipgpt_jax.text import tokenizer


def make_requests(count: int, **changes: Any) -> list[requests.Request]:
    settings = {"num_tokens": 30, "top_k": 0, "top_p": 1.0, **changes}
    return [fakes.request(fakes.prompt(i + 1), sample=i, **settings) for i in range(count)]


def sequences_of(requested: list[requests.Request], width: int = 3) -> list[requests.Sequence]:
    outputs = list(fakes.make_scheduler(batch_size=width).run(requested, fakes.SHIFTED, measure=True))
    ended = sorted((one for one in outputs if one.finish_reason is not None), key=lambda output: output.index)
    for output in ended:
        pieces = [one.text for one in outputs if one.index == output.index]
        assert "".join(pieces) == output.sequence.text
    return [output.sequence for output in ended]


def test_joined_tokens_equal_the_text_and_the_decoded_ids() -> None:
    found = sequences_of(make_requests(5))
    for one in found:
        assert "".join(one.tokens) == one.text == fakes.SHIFTED.decode(one.ids)
        assert len(one.tokens) == len(one.ids) == 30
    assert any("\ufffd" in one.text for one in found)
    assert any("" in one.tokens for one in found), "some character spans two tokens"


def test_a_stop_string_truncates_the_text_and_ends_the_sequence() -> None:
    """Tries substrings of 1, 2 and 4 characters of each text as the stop string of a batch."""
    plain = sequences_of(make_requests(4))
    for row, start in itertools.product(range(4), (0, 5, 11)):
        for length in (1, 2, 4):
            string = plain[row].text[start : start + length]
            for one, before in zip(sequences_of(make_requests(4, stop=(string, "never"))), plain, strict=True):
                assert one.ids == before.ids[: len(one.ids)]
                assert string not in one.text
                if string in before.text:
                    assert (one.finish_reason, one.stop) == ("stop", string)
                    assert one.text == before.text[: before.text.index(string)]
                    assert "".join(one.tokens).startswith(one.text + string)
                else:
                    assert (one.finish_reason, one.stop, one.text) == ("length", None, before.text)


def test_the_end_token_is_kept_and_has_no_text() -> None:
    (plain,) = sequences_of(make_requests(1))
    eos_id = plain.ids[9]
    (one,) = sequences_of(make_requests(1, eos_id=eos_id))
    end = plain.ids.index(eos_id)
    assert one.ids == plain.ids[: end + 1]
    assert one.finish_reason == "eos"
    assert one.tokens[-1] == ""
    assert one.text == fakes.SHIFTED.decode(one.ids[:-1])


@pytest.mark.parametrize("count", [1, 6, 11, 30])
def test_an_early_stop_string_is_ignored_and_not_cut(count: int) -> None:
    """The text is searched from token ``min_tokens`` on; what came before is not part of a match."""
    (plain,) = sequences_of(make_requests(1))
    piece = next(piece for piece in plain.tokens[:3] if len(piece) == 1)
    (one,) = sequences_of(make_requests(1, stop=(piece,), min_tokens=count))
    late = "".join(plain.tokens[count:])
    early = plain.text[: len(plain.text) - len(late)]
    assert one.ids == plain.ids[: len(one.ids)]
    assert len(one.ids) >= count
    if piece in late:
        assert (one.finish_reason, one.stop) == ("stop", piece)
        assert one.text == early + late[: late.index(piece)]
    else:
        assert (one.finish_reason, one.stop, one.text) == ("length", None, plain.text)
    assert (piece in one.text) == (piece in early)


def test_a_request_for_no_tokens_gives_an_empty_sequence() -> None:
    (one,) = sequences_of(make_requests(1, num_tokens=0))
    assert (one.ids, one.tokens, one.text, one.finish_reason, one.first_token) == ([], [], "", "length", None)


def test_non_finite_weights_give_an_error_and_no_text() -> None:
    params = fakes.random_params(fakes.MODEL)
    params["ln_f"]["bias"][0] = np.inf
    broken = scheduler.Scheduler(fakes.MODEL, params, config.DecodingConfig(window=11))
    (output,) = broken.run(make_requests(1), fakes.SHIFTED, measure=True)
    assert (output.finish_reason, output.text, output.token) == ("error", "", None)
    assert output.sequence.error == "the model's logits are not finite at token 0: the weights are damaged"


@pytest.mark.parametrize("width", [1, 3])
def test_outputs_are_sorted_by_request(width: int) -> None:
    outputs = fakes.make_scheduler(batch_size=width).run(make_requests(5), fakes.SHIFTED)
    order = [output.index for output in requests.in_order(outputs)]
    assert order == sorted(order)
    assert order.count(0) == 30


def test_a_streamed_sequence_keeps_none_of_its_tokens() -> None:
    """Memory is constant in the length of a streamed text that is not recorded."""
    peaks = []
    for number in (1_000, 20_000):
        sequence = requests.Sequence(fakes.request(), number, tokenizer.Tokenizer.train([], 256), keeps=False)
        tracemalloc.start()
        count = sum(len(sequence.append(65).text) for _ in range(number))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (count, sequence.finish_reason) == (number, "length")
    assert peaks[1] - peaks[0] < 10_000

"""Frames of Zstandard files, whole and cut short."""

from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hipgpt_jax import compression

CONTENT = st.one_of(st.binary(max_size=40), st.integers(1, 300_000).map(bytes), st.just(bytes(range(256)) * 900))


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draws a frame and its content, with each optional part of its header."""
    content = draw(CONTENT)
    if draw(st.integers(0, 5)) == 0:
        return b"\x5a\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content, b""
    packer = zstandard.ZstdCompressor(
        level=draw(st.sampled_from([-5, 1, 19])),
        write_checksum=draw(st.booleans()),
        write_content_size=draw(st.booleans()),
    )
    if draw(st.booleans()):
        return packer.compress(content), content
    stream = packer.compressobj()
    at = draw(st.integers(0, len(content)))
    parts = [stream.compress(content[:at]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, stream.compress(content[at:]), stream.flush()]), content


@given(st.lists(frames(), max_size=4), st.data())
@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_frames_before_any_cut_are_whole(
    tmp_path: Path, several: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    path, whole = tmp_path / "a.zst", b"".join(frame for frame, _ in several)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    size, kept = 0, b""
    for frame, content in several:
        if size + len(frame) > cut:
            break
        size, kept = size + len(frame), kept + content
    if 0 < cut - size < 4 and whole[size] == 0x5A:
        return  # the beginning of a skippable frame, whose kind is not known yet
    assert compression.size_of_whole_frames(path) == size
    assert compression.open_frames(path, size).read() == kept
    assert kept.startswith(compression.head(path, 100)[: len(kept)])


def test_a_block_of_one_byte_repeated_is_skipped(tmp_path: Path) -> None:
    path, frame = tmp_path / "a.zst", zstandard.FRAME_HEADER + b"\x20\x0a\x53\0\0a"
    path.write_bytes(frame * 2 + frame[:-1])
    assert compression.size_of_whole_frames(path) == 2 * len(frame)
    assert compression.open_frames(path, 2 * len(frame)).read() == b"a" * 20


def test_something_else_is_refused(tmp_path: Path) -> None:
    path, frame = tmp_path / "a.zst", zstandard.compress(b"a" * 100)
    for content, start in ((b"text", 0), (frame + b"\0", len(frame)), (frame + frame[:5] + b"\0\7\0\0", len(frame))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"not a Zstandard file: no frame begins at byte {start}\\."):
            compression.size_of_whole_frames(path)

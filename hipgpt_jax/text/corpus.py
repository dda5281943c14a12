"""A text file, read in pieces that tokenize exactly as the whole would."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20

# The tokenizer's regex never joins a token across a blank that follows a visible character, so a cut
# there changes no token; a cut inside a run of blanks would. The first group runs to the last such place.
# Blanks are Unicode's white space, as in the tokenizer; Python's \s has the separators \x1c to \x1f too.
_BLANKS = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_TO_LAST_BOUNDARY = re.compile(f"(.*[^{_BLANKS}])[{_BLANKS}]", re.DOTALL)


def read_text(path: Path, start: int = 0, stop: int | None = None, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[str]:
    """Yields the text of ``path`` between two byte offsets, in pieces of about ``chunk_bytes``.

    The file is read as UTF-8; each byte sequence that is not valid becomes U+FFFD, the replacement
    character, by the Unicode standard's recommended practice. Line ends are kept as they are.
    Pieces end where no token can straddle, or, where a piece holds no such place, anywhere.

    Args:
        path: A text file.
        start: First byte.
        stop: The byte after the last one; None reads to the end.
        chunk_bytes: Bytes read at a time; memory stays proportional to it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    left = (path.stat().st_size if stop is None else stop) - start
    held = ""
    with path.open("rb") as file:
        file.seek(start)
        while left > 0 and (block := file.read(min(chunk_bytes, left))):
            left -= len(block)
            text = held + decoder.decode(block, final=left <= 0)
            boundary = _TO_LAST_BOUNDARY.match(text) if left > 0 else None
            cut = boundary.end(1) if boundary else len(text)
            held = text[cut:]
            if cut:
                yield text[:cut]
    if held := held + decoder.decode(b"", final=True):
        yield held


def split_offset(path: Path) -> int:
    """Returns the byte at which the validation split, the last tenth, begins.

    The offset is nine tenths of the file's size, moved on past the continuation bytes of a UTF-8
    character so that neither side holds half of one.
    """
    offset = path.stat().st_size * 9 // 10
    with path.open("rb") as file:
        file.seek(offset)
        for byte in file.read(3):
            if byte & 0xC0 != 0x80:
                break
            offset += 1
    return offset

"""W&B's transaction log, ``run-<id>.wandb``: all records that a run's client wrote, sent or not.

The file starts with ``:W&B``, 0xBEE1 (16 bits, little endian) and a version byte, 0. After it LevelDB's log format:
blocks of 32 KiB (the first one counts the header) that hold chunks of

    checksum (CRC-32 of type and data, 32 bits) | length of the data (16 bits) | type (8 bits) | data

A record is one FULL chunk, or FIRST, any number of MIDDLE and LAST; less than a chunk's head at the end of a block is
padding. Records are ``Record`` messages of W&B's protocol buffers.

``wandb leet inspect --json`` gives the same; a test compares the two, ``benchmarks/evaluation.py`` their times.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK_BYTES = 32 * 1024
CHUNK_HEAD = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_payloads(path: Path) -> Iterator[bytes]:
    """Yield the records of a log in the order written, up to the first damage: later ones would hide a gap.

    A file that is cut off, empty, still being written or of another kind is no error.

    Raises:
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if not data.startswith(HEADER):
        return
    position, begun = len(HEADER), None
    while True:
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_HEAD.size:
            position += left
            continue
        if position + CHUNK_HEAD.size > len(data):
            return
        checksum, length, kind = CHUNK_HEAD.unpack_from(data, position)
        start, position = position + CHUNK_HEAD.size, position + CHUNK_HEAD.size + length
        if (
            length > left - CHUNK_HEAD.size
            or position > len(data)
            or zlib.crc32(data[start - 1 : position]) != checksum
        ):
            return
        chunk = data[start:position]
        if kind == FULL and begun is None:
            yield chunk
        elif kind == FIRST and begun is None:
            begun = chunk
        elif kind in (MIDDLE, LAST) and begun is not None:
            begun += chunk
            if kind == LAST:
                yield begun
                begun = None
        else:
            return

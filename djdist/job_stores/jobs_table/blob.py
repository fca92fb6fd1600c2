"""Texts as DataJoint's ``<blob>`` attributes hold them, without DataJoint, which takes long to import."""

import zlib

PROTOCOL = b"dj0\0"
TEXT = b"\5"
COMPRESSED = b"ZL123\0"
WORTH_COMPRESSING = 1000


def pack_text(text: str) -> bytes:
    """Encode a text."""
    encoded = text.encode()
    packed = PROTOCOL + TEXT + _length(encoded) + encoded
    if len(packed) <= WORTH_COMPRESSING:
        return packed
    return min(packed, COMPRESSED + _length(packed) + zlib.compress(packed), key=len)


def _length(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little")

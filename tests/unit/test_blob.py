from __future__ import annotations

import random

import datajoint as dj
import pytest

from djdist.job_stores.jobs_table.blob import pack_text

RANDOM = "".join(map(chr, random.Random(0).choices(range(1, 128), k=3000)))
TEXTS = ["", "a", "Traceback: ä 漢 \x00", "line\n" * 1000, "x" * 986, "x" * 987, RANDOM]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_text_is_packed_as_datajoint_does_it(text: str) -> None:
    assert pack_text(text) == dj.blob.pack(text)
    assert dj.blob.unpack(pack_text(text)) == text

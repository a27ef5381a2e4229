"""What people may write into a log: names."""

from __future__ import annotations

import pytest

import slidescan as ss
from slidescan.errors import ConfigError
from slidescan.reviews import decided_ids


def test_names_of_people(result: ss.ScanResult) -> None:
    """In any script, on one line; typed on another system it is the same person."""
    first = ss.review(result, reviewer="山田\u3000太郎")
    first.decide(first.items()[0].id, "accept")
    ss.review(result, reviewer="نی\u200cلوفر").decide(first.items()[0].id, "reject", label="mitosis\u3000二")
    for name in ("Ren\u00e9", "Rene\u0301", " Ren\u00e9 "):
        ss.review(result, reviewer=name).decide(first.items()[1].id, "unsure")
    first.refresh()
    assert list(first.decisions(first.items()[0].id)) == ["山田\u3000太郎", "نی\u200cلوفر"]
    assert list(first.decisions(first.items()[1].id)) == ["Ren\u00e9"]
    assert first.decision(first.items()[1].id, "Rene\u0301") is not None
    assert decided_ids(result, "unsure", reviewer="Rene\u0301") >= {first.items()[1].id}
    for name in ("a\nb", "a\u2028b", "a\x1b[31m", "\u202eann", "\u3000", "\u200d", "\ud800"):
        with pytest.raises(ConfigError, match="reviewer: expected a name on one line"):
            ss.review(result, reviewer=name)

"""The page's files, as they are served or given to a widget: what is listed here and nothing else."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

__all__ = ["MODULES", "asset", "module", "style"]

# In this order each needs only what comes before it.
MODULES = ("elements", "crops", "keys", "gallery", "boxes", "overlay", "context", "panel", "filters", "summary", "page")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./\w+\.js";\n', re.MULTILINE)
_SERVED = {
    "openseadragon.min.js": "text/javascript",
    "openseadragon.LICENSE.txt": "text/plain",
    "icon.svg": "image/svg+xml",
    "review.html": "text/html",
}


def asset(name: str) -> tuple[bytes, str] | None:
    """Return a file and its media type; None for any other name."""
    return _asset(name) if name in (*_SERVED, "review.js", "review.css") else None  # others are not kept


@cache
def _asset(name: str) -> tuple[bytes, str]:
    if name == "review.js":
        return module("start").encode(), "text/javascript"
    if name == "review.css":
        return style("start").encode(), "text/css"
    return _text(name).encode(), _SERVED[name]


def module(*last: str) -> str:
    """Return the front end as one ES module, the modules named by `last` at its end.

    A widget gets its code as one text, in which nothing can be imported by a relative path.
    """
    texts = (_IMPORT.sub("", _text(f"{name}.js")) for name in (*MODULES, *last))
    return "\n".join(re.sub(r"^export (?!default)", "", text, flags=re.MULTILINE) for text in texts)


def style(last: str) -> str:
    """Return the style of a review, and after it that of where it is shown: ``start``, the page, or ``widget``."""
    return f"{_text('review.css')}\n{_text(f'{last}.css')}"


def _text(name: str) -> str:
    return resources.files("slidescan.reviews").joinpath("assets", name).read_text(encoding="utf-8")

"""The page at `/`."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_PAGE = files("collm.serving").joinpath("playground.html").read_text(encoding="utf-8")


def _hash_of(element: str) -> str:
    """Of the content of the page's only such element, as a content security policy names it."""
    [content] = re.findall(f"<{element}>(.*?)</{element}>", _PAGE, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_HEADERS = {
    # Its own script and style run, and nothing else: not even what a model might write into the page.
    "Content-Security-Policy": (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {_hash_of('script')}; "
        f"style-src {_hash_of('style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def playground(http: Request) -> Response:
    """The playground; it holds nothing of the models, so it needs no key."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)

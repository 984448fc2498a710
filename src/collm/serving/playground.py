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
    """The hash of the page's only <element>, for the content security policy."""
    [content] = re.findall(f"<{element}>(.*?)</{element}>", _PAGE, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_HEADERS = {
    # Only the page's own script and style can run, not text that a model writes into the page.
    "Content-Security-Policy": (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {_hash_of('script')}; "
        f"style-src {_hash_of('style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def playground(http: Request) -> Response:
    """Serve the playground. It needs no API key because it has no data of the models."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)

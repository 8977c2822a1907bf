"""The chat page: one file without anything from elsewhere, under a policy that runs its own script and no other."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


def page() -> Response:
    text, policy = _read()
    return Response(text, media_type="text/html; charset=utf-8", headers={"content-security-policy": policy})


@cache
def _read() -> tuple[str, str]:
    text = FILE.read_text(encoding="utf-8")
    script, style = (" ".join(_hashes(text, tag)) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return text, policy


def _hashes(text: str, tag: str) -> list[str]:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies]

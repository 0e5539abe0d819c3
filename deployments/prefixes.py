"""Requests that reach an ingress replica under another route prefix than its own.

While two applications change prefixes (upgrade.py), HAProxy still sends by the old ones for a moment, and Serve's replicas
answer 404 to what does not begin with theirs. HAProxy alone decides who gets a request.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.types import Receive, Scope, Send

# Where one of our routes begins, behind whatever prefix the other application had.
_ROUTE = re.compile(
    r"/(?:(?:v1|page|\.well-known)/|(?:healthz|readyz|health|docs|openapi\.json|embeddings|models|vectorize|meta)?$)"
)


def accept_any() -> None:
    """Have this process's replica take such requests as its own. Calling it again changes nothing."""
    from ray.serve._private.replica import Replica

    kind: Any = Replica
    original = kind._direct_ingress_asgi
    if getattr(original, "accepts_any", False):
        return

    async def accepting(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = (self._route_prefix or "").rstrip("/")
        path = scope.get("path", "")
        if not (path == prefix or path.startswith(f"{prefix}/")) and not path.startswith("/-/"):
            known = _ROUTE.search(path)
            scope["path"] = prefix + (path[known.start() :] if known else path)
        await original(self, scope, receive, send)

    accepting.accepts_any = True  # type: ignore[attr-defined]
    kind._direct_ingress_asgi = accepting

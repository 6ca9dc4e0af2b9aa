"""`transformers serve` below `kvplug run`: what kvplug refuses reaches the client.

A request names its cache in the field `generation_config`, a JSON text. The server lets exceptions
fall through to a bare "500 Internal Server Error"; a misspelt strategy is the client's to mend, so
it is answered by 400 with the error's text, in the form of the OpenAI API.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .errors import KvplugError

if TYPE_CHECKING:
    from types import ModuleType


def attach(server: ModuleType) -> None:
    """Have the apps that `transformers.cli.serving.server` builds answer a KvplugError."""
    from starlette.responses import JSONResponse

    build = server.build_server

    async def answer(request: Any, error: KvplugError) -> JSONResponse:
        said = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": said}, status_code=400)

    @functools.wraps(build)
    def build_server(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.add_exception_handler(KvplugError, answer)
        return app

    server.build_server = build_server

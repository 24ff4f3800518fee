"""The studio over HTTP: a page, and JSON behind it, for one person on this machine or one who knows the password.

Not Gradio: transformers 4, which has the Flax models, keeps it at 6.17, where a part that was hidden before it was
first shown stays hidden; and words to hover, completion and masks want a page of their own anyway.
"""

import base64
import io
import json
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from perfusion_jax.runtime.errors import InputError, is_jax_runtime_error, out_of_memory
from perfusion_jax.runtime.names import STUDIO
from perfusion_jax.web.forms import Form
from perfusion_jax.web.intake import MOST_PICTURES
from perfusion_jax.web.studio import Studio

PAGE = Path(__file__).parent / "page"
USER = "studio"
"""Who logs in, where a password is asked for."""

MOST_SENT = 16 * 2**20  # bytes of a request but for pictures that are dropped
MOST_DROPPED = 512 * 2**20  # bytes of all pictures of one thing
LOCAL_HOSTS = ["127.0.0.1", "localhost", "[::1]"]
_HEADERS = {
    # Nothing is fetched from elsewhere, and nothing that a person typed can run.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def message_of(error: Exception) -> str:
    """What the page says of an error; a fault of the program leaves its traceback on the terminal."""
    if isinstance(error, InputError):
        return str(error)
    reason = out_of_memory(error) if is_jax_runtime_error(error) else ""
    if reason:
        return f"the memory of a device does not suffice ({reason}): take smaller pictures"
    logging.error("%s", "".join(traceback.format_exception(error)))
    return f"a fault of the program (see the terminal): {type(error).__name__}: {error}"


def make_app(studio: Studio, password: str | None, local: bool) -> Starlette:
    """The studio as a web application.

    Args:
        studio: what is behind it.
        password: what USER has to give, or None.
        local: whether it is reached from this machine alone; other names of it are then refused, under which pages
            from elsewhere could ask (DNS rebinding).
    """

    def answer(function: Callable[[Form], Any]) -> Callable[[Request], Awaitable[Response]]:
        """A route that gives a function the JSON that was sent, and sends what it returns."""

        async def route(request: Request) -> Response:
            try:
                form = Form(await _json(request))
                return JSONResponse(await run_in_threadpool(function, form))
            except Exception as error:
                return _refused(message_of(error))

        return route

    def file(function: Callable[[Request], Path]) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            try:
                return FileResponse(await run_in_threadpool(function, request))
            except InputError as error:
                return _refused(str(error), 404)

        return route

    async def state(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(studio.state))
        except Exception as error:
            return _refused(message_of(error))

    async def drop(request: Request) -> Response:
        """Pictures that are dropped, each streamed to a file that is deleted when they have been taken in."""
        uploads = studio.runs / STUDIO / "uploads"
        uploads.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=uploads) as folder:
                files, names = await _receive(request, Path(folder))
                return JSONResponse(await run_in_threadpool(studio.drop, files, names))
        except Exception as error:
            return _refused(message_of(error))

    async def restore(request: Request) -> Response:
        uploads = studio.runs / STUDIO / "uploads"
        uploads.mkdir(parents=True, exist_ok=True)
        try:
            if request.query_params.get("drawing"):
                found = await run_in_threadpool(studio.drawing, request.query_params["drawing"])
                return JSONResponse(await run_in_threadpool(studio.restore, found, found.name))
            with tempfile.TemporaryDirectory(dir=uploads) as folder:
                files, names = await _receive(request, Path(folder))
                if not files:
                    raise InputError("no picture was sent")
                return JSONResponse(await run_in_threadpool(studio.restore, files[0], names[0]))
        except Exception as error:
            return _refused(message_of(error))

    async def draw(request: Request) -> Response:
        try:
            form = Form(await _json(request))
        except InputError as error:
            return _refused(str(error))

        def lines() -> Iterator[str]:
            try:
                for each in studio.draw(form):
                    yield json.dumps(each, default=_cover) + "\n"
            except Exception as error:
                yield json.dumps({"error": message_of(error)}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    def look(form: Form) -> dict[str, Any]:
        warning, shown = studio.look(form)
        pictures = [{"name": each.name, "picture": _png(each.pixels), "mask": _png(_grey(each.mask))} for each in shown]
        return {"warning": warning, "previews": pictures}

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    routes = [
        Route("/", page),
        Route("/api/state", state),
        Route("/api/drop", drop, methods=["POST"]),
        Route("/api/look", answer(look), methods=["POST"]),
        Route("/api/learn", answer(studio.learn), methods=["POST"]),
        Route("/api/kind", answer(lambda form: {"warning": studio.warning(form.text("kind", 100))}), methods=["POST"]),
        Route("/api/act", answer(lambda form: studio.act(form.text("act"), form.text("run"))), methods=["POST"]),
        Route("/api/draw", draw, methods=["POST"]),
        Route("/api/recipe", restore, methods=["POST"]),
        Route("/api/rename", answer(lambda form: studio.rename(form.text("key"), form.text("name"))), methods=["POST"]),
        Route("/api/delete", answer(lambda form: studio.delete(form.text("key"))), methods=["POST"]),
        Route("/api/export", answer(lambda form: studio.export(form.text("key"), form.text("to"))), methods=["POST"]),
        Route("/grid", file(lambda request: studio.grid_of(request.query_params.get("key", "")))),
        Route("/drawings/{name}", file(lambda request: studio.drawing(request.path_params["name"]))),
        Route("/exports/{call}/{kind}/{name}", file(lambda request: studio.exported(**request.path_params))),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=_guard(password))]
    if local:
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS))
    return Starlette(routes=routes, middleware=middleware)


def _guard(password: str | None) -> Callable[..., Awaitable[Response]]:
    """Asks for the password, refuses what pages of other sites send, and adds the headers of all answers."""

    async def guard(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        if password is not None and not _knows(request.headers.get("authorization", ""), password):
            headers = {"WWW-Authenticate": 'Basic realm="Perfusion studio", charset="UTF-8"'}
            return PlainTextResponse("the studio asks for its password", 401, {**_HEADERS, **headers})
        origin = request.headers.get("origin")
        if request.method != "GET" and origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return PlainTextResponse("this was sent by a page of another site", 403, _HEADERS)
        response = await forward(request)
        response.headers.update(_HEADERS)
        if "at" in request.query_params or request.url.path.startswith("/drawings/"):  # a picture that stays as it is
            response.headers["Cache-Control"] = "private, max-age=86400"
        return response

    return guard


def _knows(header: str, password: str) -> bool:
    try:
        sent = base64.b64decode(header.removeprefix("Basic "))
    except ValueError:
        return False
    return secrets.compare_digest(sent, f"{USER}:{password}".encode())


def _refused(words: str, status: int = 400) -> Response:
    return JSONResponse({"error": words}, status)


async def _json(request: Request) -> Any:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_SENT:
            raise InputError(f"more was sent than {MOST_SENT >> 20} MiB")
    try:
        return json.loads(data)
    except ValueError as error:  # no UTF-8, or no JSON
        raise InputError("what was sent is not JSON") from error


async def _receive(request: Request, folder: Path) -> tuple[list[Path], list[str]]:
    """Writes the files of a form to a folder, under numbers; returns them and what they were called.

    Raises:
        InputError: they are too many, or more than is taken, or did not arrive whole.
    """
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise InputError("how much is sent was not said")
    if int(length) > MOST_DROPPED:
        raise InputError(f"{int(length) / 2**20:.0f} MiB were sent; at most {MOST_DROPPED >> 20} are taken at once")
    files: list[Path] = []
    names: list[str] = []
    try:
        async with request.form(max_files=MOST_PICTURES, max_fields=0) as form:
            for upload in form.getlist("files"):
                if not isinstance(upload, UploadFile):
                    continue
                file = folder / f"{len(files)}"
                with file.open("wb") as target:
                    await run_in_threadpool(shutil.copyfileobj, upload.file, target)
                files.append(file)
                names.append((upload.filename or "picture")[:200])
    except HTTPException as error:
        raise InputError(f"what was sent cannot be read: {error.detail}") from error
    except ClientDisconnect as error:
        raise InputError("the pictures did not arrive whole: send them again") from error
    return files, names


def _png(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _grey(mask: np.ndarray) -> np.ndarray:
    return np.round(255 * mask).astype(np.uint8)


def _cover(looks: Any) -> str:
    """Black over what a picture did not look at, as a PNG (`drawing.attention_sheets`)."""
    cover = np.zeros((*looks.shape, 4), np.uint8)
    cover[..., 3] = np.round(0.85 * (255 - looks.astype(np.float32)))
    return _png(cover)

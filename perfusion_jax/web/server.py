"""The studio over HTTP: a page, and JSON behind it, for one person who knows its address or its password.

Not Gradio: transformers 4, which has the Flax models, keeps it at 6.17, where a part that was hidden before it was
first shown stays hidden; and words to hover, completion and masks want a page of their own anyway.
"""

import base64
import io
import json
import secrets
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import STUDIO
from perfusion_jax.web.faults import message_of
from perfusion_jax.web.forms import Form
from perfusion_jax.web.intake import MOST_BYTES, MOST_PICTURES
from perfusion_jax.web.studio import Studio, written

PAGE = Path(__file__).parent / "page"
USER = "studio"
"""Who logs in, where a password is asked for."""

MOST_SENT = 16 * 2**20  # bytes of a request but for pictures that are dropped
MOST_DROPPED = 512 * 2**20  # bytes of all pictures of one thing
MOST_DRAWING = 16  # drawings that wait for their turn in threads of their own
COOKIE = "perfusion_studio"
_YEAR = 365 * 24 * 3600
_AROUND = 2**20  # bytes of a form around its one file
_STAYS = "private, max-age=86400"  # of a picture whose address changes with it
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


class _Json(JSONResponse):
    """JSON in ASCII: file names that are no Unicode must not keep the page from its state."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def make_app(studio: Studio, password: str | None, local: bool, token: str | None = None) -> Starlette:
    """The studio as a web application.

    Args:
        studio: what is behind it.
        password: what USER has to give, or None.
        token: without a password, what the address has to end in when a browser first comes; None: nothing is asked.
        local: whether it is reached from this machine alone; other names of it are then refused, under which pages
            from elsewhere could ask (DNS rebinding).
    """
    pages = _Pages(studio)
    post = ["POST"]
    routes = [
        Route("/", pages.front),
        Route("/api/state", pages.state),
        Route("/api/drop", pages.drop, methods=post),
        Route("/api/look", _answer(pages.look), methods=post),
        Route("/api/learn", _answer(studio.learn), methods=post),
        Route("/api/kind", _answer(lambda form: {"warning": studio.warning(form.text("kind", 100))}), methods=post),
        Route("/api/act", _answer(pages.act), methods=post),
        Route("/api/draw", pages.draw, methods=post),
        Route("/api/recipe", pages.restore, methods=post),
        Route("/api/rename", _answer(lambda form: studio.rename(form.text("key"), form.text("name"))), methods=post),
        Route("/api/doomed", _answer(lambda form: studio.doomed(form.text("key"), form.text("run"))), methods=post),
        Route("/api/delete", _answer(pages.delete), methods=post),
        Route("/api/export", _answer(lambda form: studio.export(form.text("key"), form.text("to"))), methods=post),
        Route("/grid", _picture(pages.grid)),
        Route("/drawings/{name}", _picture(lambda request: studio.drawing(request.path_params["name"]))),
        Route("/exports/{call}/{kind}/{name}", pages.exported),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=_guard(password, token))]
    if local:
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS))
    return Starlette(routes=routes, middleware=middleware)


def _answer(function: Callable[[Form], Any]) -> Callable[[Request], Awaitable[Response]]:
    """A route that gives a function the JSON that was sent, and sends what it returns."""

    async def route(request: Request) -> Response:
        try:
            form = Form(await _json(request))
            return _Json(await run_in_threadpool(function, form))
        except Exception as error:
            return _refused(message_of(error))

    return route


def _picture(function: Callable[[Request], Path]) -> Callable[[Request], Awaitable[Response]]:
    """A route that sends a small PNG; where the address says when it was written, browsers may keep it."""

    def read(request: Request) -> tuple[bytes, bool]:
        file = function(request)
        stays = request.query_params.get("at") == written(file) != ""
        return file.read_bytes(), stays

    async def route(request: Request) -> Response:
        try:
            data, stays = await run_in_threadpool(read, request)
        except InputError as error:
            return _refused(str(error), 404)
        except OSError:
            return _refused("it is not there any more", 404)
        return Response(data, headers={"Cache-Control": _STAYS} if stays else {}, media_type="image/png")

    return route


class _Pages:
    """What is answered by more than one call of the studio."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    async def front(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def state(self, request: Request) -> Response:
        try:
            return _Json(await run_in_threadpool(self._studio.state))
        except Exception as error:
            return _refused(message_of(error))

    async def drop(self, request: Request) -> Response:
        """Pictures that are dropped, each streamed to a file that is deleted when they have been taken in."""
        try:
            with self._uploads() as folder:
                files, names = await _receive(request, Path(folder), MOST_PICTURES, MOST_DROPPED)
                view = request.query_params.get("view", "")
                return _Json(await run_in_threadpool(self._studio.drop, files, names, view))
        except Exception as error:
            return _refused(message_of(error))

    def look(self, form: Form) -> dict[str, Any]:
        warning, shown = self._studio.look(form)
        pictures = [{"name": each.name, "picture": _png(each.pixels), "mask": _png(_grey(each.mask))} for each in shown]
        return {"warning": warning, "previews": pictures}

    def act(self, form: Form) -> None:
        self._studio.act(form.text("act"), form.text("run"), form.flag("photographs", False))

    def delete(self, form: Form) -> None:
        self._studio.delete(form.text("key"), form.flag("photographs", False))

    async def draw(self, request: Request) -> Response:
        """Lines of JSON, one each time that there is something to show."""
        try:
            form = Form(await _json(request))
        except InputError as error:
            return _refused(str(error))

        gone = threading.Event()

        def lines() -> Iterator[str]:
            try:
                for each in self._studio.draw(form, lambda: not gone.is_set()):
                    yield json.dumps(each, default=_cover) + "\n"
            except Exception as error:
                yield json.dumps({"error": message_of(error)}) + "\n"

        async def sent() -> AsyncIterator[str]:
            drawn = lines()
            try:
                while line := await to_thread.run_sync(
                    next, drawn, "", abandon_on_cancel=True, limiter=_limiter(request)
                ):
                    yield line
            finally:
                gone.set()  # so that what is being drawn ends with its step

        return StreamingResponse(sent(), media_type="application/x-ndjson")

    async def restore(self, request: Request) -> Response:
        """The recipe of a drawing, which the studio has or which is sent."""
        try:
            if request.query_params.get("drawing"):
                found = await run_in_threadpool(self._studio.drawing, request.query_params["drawing"])
                return _Json(await run_in_threadpool(self._studio.restore, found, found.name))
            with self._uploads() as folder:
                files, names = await _receive(request, Path(folder), 1, MOST_BYTES + _AROUND)
                if not files:
                    raise InputError("no picture was sent")
                return _Json(await run_in_threadpool(self._studio.restore, files[0], names[0]))
        except Exception as error:
            return _refused(message_of(error))

    def grid(self, request: Request) -> Path:
        run = request.query_params.get("run", "")
        return self._studio.grid_of_run(run) if run else self._studio.grid_of(request.query_params.get("key", ""))

    async def exported(self, request: Request) -> Response:
        try:
            file = await run_in_threadpool(self._studio.exported, **request.path_params)
            return FileResponse(file, stat_result=file.stat())
        except InputError as error:
            return _refused(str(error), 404)
        except OSError:
            return _refused("it is not there any more", 404)

    def _uploads(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for what is sent, among the runs: there is room for it."""
        uploads = self._studio.runs / STUDIO / "uploads"
        uploads.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=uploads)


def _guard(password: str | None, token: str | None) -> Callable[..., Awaitable[Response]]:
    """Asks for the password or the token, refuses what pages of other sites send, and adds the headers of all answers.

    Others have accounts on this machine, too: its address alone lets nobody in.
    """

    async def guard(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        if password is not None and not _knows(request.headers.get("authorization", ""), password):
            headers = {"WWW-Authenticate": 'Basic realm="Perfusion studio", charset="UTF-8"'}
            return PlainTextResponse("the studio asks for its password", 401, {**_HEADERS, **headers})
        if password is None and token is not None:
            cookie = f"{COOKIE}_{request.url.port}"  # the ports of a machine share their cookies
            if _is(request.query_params.get("token", ""), token):
                response: Response = RedirectResponse("/", 303, _HEADERS)
                response.set_cookie(cookie, token, max_age=_YEAR, httponly=True, samesite="strict")
                return response
            if not _is(request.cookies.get(cookie, ""), token):
                words = "open the address that the studio printed when it started: it ends in ?token=…"
                return PlainTextResponse(words, 403, _HEADERS)
        origin = request.headers.get("origin")
        if request.method != "GET" and origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return PlainTextResponse("this was sent by a page of another site", 403, _HEADERS)
        response = await forward(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return guard


def _is(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(errors="replace"), token.encode())


def _knows(header: str, password: str) -> bool:
    try:
        sent = base64.b64decode(header.removeprefix("Basic "))
    except ValueError:
        return False
    return secrets.compare_digest(sent, f"{USER}:{password}".encode())


def _refused(words: str, status: int = 400) -> Response:
    return _Json({"error": words}, status)


async def _json(request: Request) -> Any:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_SENT:
            raise InputError(f"more was sent than {MOST_SENT >> 20} MiB")
    try:
        return json.loads(data)
    except (RecursionError, ValueError) as error:  # nested too deeply, no UTF-8, or no JSON
        raise InputError("what was sent is not JSON") from error


def _limiter(request: Request) -> CapacityLimiter:
    """The threads of drawings: those that wait for their turn must not keep the rest of the page waiting."""
    kept = request.app.state
    if not hasattr(kept, "drawings"):
        kept.drawings = CapacityLimiter(MOST_DRAWING)  # here, for it belongs to the loop that serves
    return kept.drawings


async def _receive(request: Request, folder: Path, most: int, most_bytes: int) -> tuple[list[Path], list[str]]:
    """Writes the files of a form to a folder, under numbers; returns them and what they were called.

    Args:
        request: with the form.
        folder: where to.
        most, most_bytes: files and bytes that are taken.

    Raises:
        InputError: they are too many, or more than is taken, or did not arrive whole.
    """
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdecimal() and len(length) < 20):
        raise InputError("how much is sent was not said")
    if int(length) > most_bytes:
        raise InputError(f"{int(length) / 2**20:.0f} MiB were sent; at most {most_bytes >> 20} are taken at once")
    files: list[Path] = []
    names: list[str] = []
    try:
        async with request.form(max_files=most, max_fields=0) as form:
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

"""Opens the studio: a page in the browser on which things are learnt, drawn and kept.

    python -m perfusion_jax.studio [--runs runs/] [--base emoji]

It listens on this machine alone, and prints an address, http://127.0.0.1:7860/?token=..., without whose token nobody on
it is let in. With `--host` others reach it too; it then wants a password, in PERFUSION_STUDIO_PASSWORD, and the user is
called `studio`. Runs are the commands' own: what is begun on the page
goes on by `perfusion_jax.train`, and the other way round. Ctrl-C saves what is being learnt; it goes on the next time.
"""

import os
import secrets
import socket
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from absl import flags
from etils import epath

from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import at_home, check_writable, is_local, locked, storage_errors
from perfusion_jax.runtime.names import STUDIO

LOCAL = ("127.0.0.1", "localhost", "::1")
PASSWORD = "PERFUSION_STUDIO_PASSWORD"


def check_password(host: str) -> str | None:
    """The password that the page asks for; None where it asks for none.

    Raises:
        InputError: others reach the page, and there is no password.
    """
    password = os.environ.get(PASSWORD)
    if host not in LOCAL and not password:
        raise InputError(f"--host={host}: others can reach the page: give a password, in the variable {PASSWORD}")
    return password or None


def token_of(hidden: Path) -> str:
    """The token of the studio's address, the same whenever it starts, so that an open page goes on.

    Args:
        hidden: the studio's own folder; this machine's other accounts cannot read the file in it.

    Raises:
        InputError, UnavailableError: it cannot be kept.
    """
    file = hidden / "token"
    with storage_errors(file, "written"):
        with suppress(FileExistsError):
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_urlsafe(24))
        token = file.read_text().strip()
    if not token:
        raise InputError(f"{file}: empty; delete it")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: it cannot.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"--host={host} --port={port}: {error.strerror or error}; take another --port") from error


def main() -> None:
    """Serves the page until Ctrl-C."""
    given = flags.FLAGS
    if not is_local(given.runs):
        raise InputError(f"--runs={given.runs}: the studio keeps its runs on this machine; give a folder")
    password = check_password(given.host)
    if any(find_spec(name) is None for name in ("starlette", "uvicorn", "python_multipart")):
        raise InputError("the studio's server is not installed: pip install 'perfusion_jax[studio]'")
    runs = Path(at_home(given.runs)).resolve()
    hidden = runs / STUDIO
    check_writable(hidden / "uploads")
    with locked(epath.Path(hidden / "lock"), "open the page of that studio, or take another --runs"):
        tempfile.tempdir = str(hidden / "uploads")  # what people send lies among the runs from the first byte on
        # Imported when the flags are right: JAX takes seconds.
        import uvicorn

        from perfusion_jax.web.server import make_app
        from perfusion_jax.web.studio import Studio

        with listen(given.host, given.port) as listening:
            base = {"source": given.base, "revision": given.revision, "variant": given.variant}
            studio = Studio.open(runs, base)
            token = None if password else token_of(hidden)
            app = make_app(studio, password, given.host in LOCAL, token)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
            address, port = listening.getsockname()[:2]
            ending = f"/?token={token}" if token else ""
            print(
                f"the studio: http://{f'[{address}]' if ':' in address else address}:{port}{ending}  (Ctrl-C ends it)",
                flush=True,
            )
            try:
                server.run(sockets=[listening])
            finally:
                studio.close()


def run() -> None:
    """The command."""
    flags.DEFINE_string("runs", "runs", "folder of the runs, which is the library")
    flags.DEFINE_string("base", "emoji", "base model: emoji, sd15, sd21, sdxl, a folder, a file or a hub id")
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0 for all of this machine's")
    flags.DEFINE_integer("port", 7860, "port to listen on; 0 for any that is free", lower_bound=0, upper_bound=65535)
    command_line.run(main, resumes=True)


if __name__ == "__main__":
    run()

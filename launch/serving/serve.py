"""Show runs on a local page: compare, sort, filter, watch; it reads and never writes.

    letheon serve runs
    letheon serve /scratch/me/runs /scratch/you/runs --port 0

The page is for this machine alone (127.0.0.1) unless --address says otherwise. From a cluster:
ssh -L 8731:localhost:8731 HOST, and open the address that is printed. It loads nothing from
elsewhere; nothing that a run folder holds runs in it, and no file outside the folders is read.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tyro

from letheon.engine.distributed import Ranks
from letheon.engine.runs.stop import Stopped
from letheon.errors import InputError
from letheon.launch.command import run_command
from letheon.launch.console.summary import console
from letheon.launch.serving.site import Answer, Site
from letheon.progress import note

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer. Scripts and styles come from two files of ours, which no run can be."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Show the runs of folders on a local page: sort, filter, compare, watch. It only reads."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders in which runs and tables lie, up to five folders deep."""
    port: int = 8731
    """Port; 0: one that is free."""
    address: str = "127.0.0.1"
    """Address of this machine to listen on; by default no other machine can ask."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with a page of the site, to who asks this machine by its number."""

    server: Server
    timeout = 20
    server_version, sys_version = "letheon", ""

    def do_GET(self) -> None:
        """Send the answer for the address; its head alone for HEAD."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_own_host(hosts[0], self.server.address):
            answer = Answer(
                HTTPStatus.MISDIRECTED_REQUEST, b"Not the host of this page.", "text/plain"
            )
        else:
            answer = self.server.site.answer(self.path, self.headers.get("If-None-Match", ""))
        self.send_response(answer.status)
        if answer.tag:
            self.send_header("ETag", answer.tag)
        if answer.status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET

    def end_headers(self) -> None:
        """End the head of any answer, refusals of the base class included, with `HEADERS`."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: addresses hold the secret part."""


class Server(ThreadingHTTPServer):
    """Serves a site on one address, a thread a request."""

    daemon_threads = True

    def __init__(self, settings: Settings) -> None:
        """Listen.

        Raises:
            InputError: a folder is none, or the port or address cannot be had.
        """
        if not settings.folders:
            raise InputError("got no folder; expected one that runs lie in; name it")
        for folder in settings.folders:
            if not folder.is_dir():
                raise InputError(f"got {folder}; expected a folder that runs lie in")
        self.address, self.site = settings.address, Site(settings.folders)
        try:
            version = ipaddress.ip_address(settings.address).version
            self.address_family = socket.AF_INET6 if version == 6 else socket.AF_INET
            super().__init__((settings.address, settings.port), Handler)
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"got {settings.address}, port {settings.port}; it cannot be listened on "
                f"({reason}); name another port, or 0 for a free one",
                option="port",
            ) from error

    @property
    def url(self) -> str:
        """Address of the list of runs."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.server_port}{self.site.base}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line what broke a connection; a browser that has left is no news."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"warning: a request failed ({type(error).__name__}: {error})", file=sys.stderr)


def is_own_host(host: str, address: str) -> bool:
    """Whether a Host header names this machine by number or as localhost.

    A page elsewhere whose name is made to lead to this machine (DNS rebinding) has a name.

    Args:
        host: the header.
        address: that is listened on; a loopback address is asked by loopback addresses alone.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if set(host) & set("@/?#"):
            return False
        if name == "localhost":
            return True
        number = ipaddress.ip_address(name)
        return number.is_loopback or not ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def main(settings: Settings, ranks: Ranks) -> None:
    """Serve until a signal comes."""
    if not ranks.main:
        return
    with Server(settings) as server:
        if not ipaddress.ip_address(settings.address).is_loopback:
            note("note: whoever reaches this address and knows the whole of it can read the runs")
        try:
            if console().json:
                console().show(json.dumps({"url": server.url}))
            else:
                print(f"{server.url}  (Ctrl-C ends it)", flush=True)
            if not server.site.look():
                places = ", ".join(map(str, settings.folders))
                note(
                    f"warning: got {places}, where no run and no table is yet; the page shows them"
                )
            server.serve_forever()
        except Stopped:
            pass


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()

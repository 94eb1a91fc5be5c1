"""A small HTTP server in a thread, with the faults that real ones have."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    etag: str = '"one"'
    modified: str = ""
    lengths: bool = True
    """Without: the end of the connection is the end of the file, as in HTTP/1.0."""
    chunked: bool = False
    dies_after: list[int] = field(default_factory=list)
    """For each request to come: the connection breaks after so many bytes of the body."""
    stalls_after: list[int] = field(default_factory=list)
    """For each request to come: nothing more is sent after so many bytes, until `resume` is set."""
    statuses: list[int] = field(default_factory=list)
    """For each request to come: answer with that error."""
    resume: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Path, Range, If-Range of each request."""
    sent: int = 0
    url: str = ""


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve `site` on a free port of the loopback device."""

    class Handler(_Handler):
        pass

    Handler.site = site
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        site.resume.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site = self.site
        path = self.path.partition("?")[0]
        site.asked.append((path, self.headers.get("Range", ""), self.headers.get("If-Range", "")))
        self.close_connection = True
        if site.statuses:
            self._plain(site.statuses.pop(0))
        elif path in site.redirects:
            self._plain(302, Location=site.redirects[path])
        elif path not in site.files:
            self._plain(404)
        else:
            self._file(site.files[path])

    def _plain(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, content: bytes) -> None:
        site, start = self.site, self._start(len(content))
        if start >= len(content) > 0:
            self._plain(416, **{"Content-Range": f"bytes */{len(content)}"})
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in (("ETag", site.etag), ("Last-Modified", site.modified)):
            if value:
                self.send_header(name, value)
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif site.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            self._body(content[start:])

    def _start(self, _length: int) -> int:
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if not wanted or not self.site.ranges:
            return 0
        if condition and condition not in (self.site.etag, self.site.modified):
            return 0
        return int(wanted.removeprefix("bytes=").partition("-")[0])

    def _body(self, body: bytes) -> None:
        site = self.site
        if site.chunked:
            self._write(b"%x\r\n%s\r\n" % (len(body), body))
            end = b"0\r\n\r\n"
            self._write(end if not site.dies_after or not site.dies_after.pop(0) else b"")
            return
        if site.dies_after:
            self._write(body[: site.dies_after.pop(0)])
        elif site.stalls_after:
            part = site.stalls_after.pop(0)
            self._write(body[:part])
            site.resume.wait(30)
        else:
            self._write(body)

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        self.site.sent += len(data)

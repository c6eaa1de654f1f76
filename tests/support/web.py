"""Small HTTP servers that stand in for others."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine that answers by the handler, until the block is left."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        side = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        side.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            side.join()

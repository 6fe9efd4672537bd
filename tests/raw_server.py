"""A server of which a test says what it does on each connection, byte by byte; over TLS, record by record."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn


class Wire:
    """One connection of the server.

    Attributes:
        sock: The socket.
        number: Which connection it is, from 0.
        requests: What it was asked, heads and bodies.
        said_all: For whoever serves: to be set when all has been sent.
    """

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self.requests: list[bytes] = []
        self.said_all = threading.Event()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self) -> bytes | None:
        """The next request; None if there is none."""
        data = b""
        while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < length_of(data):
            piece = self.read()
            if not piece:
                return None
            data += piece
        self.requests.append(data)
        return data

    def read(self) -> bytes:
        """What comes; nothing at the end."""
        with suppress(OSError):
            return self.sock.recv(65536)
        return b""

    def send(self, *pieces: bytes, goodbye: bool = False) -> None:
        """Send pieces, in one packet as far as they fit; then, over TLS, say that it is the end."""
        self.sock.sendall(b"".join(pieces))
        if goodbye:
            self.sock.shutdown(socket.SHUT_WR)

    def hang_up(self) -> NoReturn:
        """End the conversation."""
        raise ConnectionAbortedError

    def reset(self) -> None:
        """Close it without a goodbye."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class TlsWire(Wire):
    """One connection with TLS: each piece that is sent is a record of its own."""

    def __init__(self, sock: socket.socket, number: int, context: ssl.SSLContext) -> None:
        super().__init__(sock, number)
        self.come, self.gone = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.come, self.gone, server_side=True)
        self._pump(self.tls.do_handshake)

    def _pump(self, work: Callable[..., bytes | None], *arguments: object) -> bytes | None:
        while True:
            try:
                done = work(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.sock.recv(65536)
                if not data:
                    return b""
                self.come.write(data)
            else:
                self._flush()
                return done

    def _flush(self) -> None:
        if self.gone.pending:
            self.sock.sendall(self.gone.read())

    def read(self) -> bytes:
        with suppress(ssl.SSLError, OSError):
            return self._pump(self.tls.read, 65536) or b""
        return b""

    def send(self, *pieces: bytes, goodbye: bool = False) -> None:
        self.sock.sendall(self.records(*pieces, goodbye=goodbye))

    def records(self, *pieces: bytes, goodbye: bool = False) -> bytes:
        """What `send` would send."""
        for piece in pieces:
            self.tls.write(piece)
        if goodbye:
            with suppress(ssl.SSLWantReadError):
                self.tls.unwrap()
        return self.gone.read()


@dataclass
class RawServer:
    """A server that is up.

    Attributes:
        url: Its base URL.
        wires: Its connections, in the order in which they were opened.
    """

    port: int
    is_tls: bool
    wires: list[Wire] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://127.0.0.1:{self.port}/v1"

    @property
    def requests(self) -> list[bytes]:
        """All that it was asked."""
        return [request for wire in self.wires for request in wire.requests]


@contextmanager
def raw_server(talk: Callable[[Wire], object], tls: ssl.SSLContext | None = None) -> Iterator[RawServer]:
    """Serve, each connection in a thread of its own; at the end all are closed, and the threads have ended."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    server = RawServer(listener.getsockname()[1], tls is not None)
    threads: list[threading.Thread] = []
    socks: list[socket.socket] = []

    def serve(sock: socket.socket, number: int) -> None:
        with suppress(OSError, ssl.SSLError, ValueError), sock:  # the last: a socket that was reset is no number
            wire = Wire(sock, number) if tls is None else TlsWire(sock, number, tls)
            server.wires.append(wire)
            talk(wire)

    def accept() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                socks.append(sock)
                threads.append(threading.Thread(target=serve, args=(sock, len(threads)), daemon=True))
                threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield server
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(5)
        for sock in socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)


def length_of(data: bytes) -> int:
    """The length that the head of a request says its body has."""
    return int(data.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)


def http(body: bytes, *headers: str, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """An answer with a body of a known length."""
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body):08}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def said(text: str, size: int = 0) -> bytes:
    """An answer of a model.

    Args:
        text: What it says.
        size: Bytes of all of the answer; the text is filled up to that. 0: as long as it is.
    """

    def whole(content: str) -> bytes:
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return http(json.dumps({"choices": [choice]}).encode())

    return whole(text + "x" * max(size - len(whole(text)), 0))


def refused(status: str, message: str = "no") -> bytes:
    """An answer that says that something is wrong."""
    return http(json.dumps({"error": {"message": message}}).encode(), status=status)


def body_of(answer: bytes) -> bytes:
    """The body of an answer, or of a request."""
    return answer.partition(b"\r\n\r\n")[2]

"""An S3 that misbehaves on order: moto behind a proxy that fails some of the reads, for the tests of storage."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


class ObjectStore:
    """`faults`: what happens to the next GETs of objects whose name ends with `of`, in order; then all is well again.

    A fault is a status of CODES; "reset" (no answer), "hang" (no answer, connection open), "cut" (half of the body, then closed),
    "short" (half of the body, called complete), "garbled" (a wrong byte), "stall" (half of the body, then silence) or "crawl" (20 bytes
    per second, never silent).
    """

    def __init__(self, moto_port: int) -> None:
        self.moto_port, self.faults, self.of, self.asked = moto_port, [], "", []
        self.over = threading.Event()  # ends what hangs, stalls and crawls
        self._lock = threading.Lock()

    def fail(self, *faults: int | str, of: str = "") -> None:
        self.over.set()
        self.over, self.faults, self.of, self.asked = threading.Event(), list(faults), of, []

    def next_fault(self, path: str) -> int | str | None:
        with self._lock:
            name = path.partition("?")[0]
            if name.count("/") < 2 or not name.endswith(self.of):  # a listing is a GET of the bucket
                return None
            self.asked.append(name)
            return self.faults.pop(0) if self.faults else None

    def put(self, bucket: str, folder: Path) -> None:
        import boto3

        s3 = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.moto_port}", region_name="us-east-1",
                          aws_access_key_id="test", aws_secret_access_key="test")
        s3.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            s3.upload_file(str(path), bucket, f"{folder.name}/{path.name}")


@contextlib.contextmanager
def object_store() -> Iterator[tuple[ObjectStore, str]]:
    """(the store, the options an s3:// URI needs to reach it through the proxy)."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    store = ObjectStore(moto.get_host_and_port()[1])
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Proxy,), {"store": store}))
    proxy.daemon_threads, proxy.block_on_close = True, False
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield store, f"scheme=http&endpoint_override=127.0.0.1:{proxy.server_port}&region=us-east-1"
    finally:
        store.over.set()
        proxy.shutdown()
        proxy.server_close()
        moto.stop()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.store.next_fault(self.path) if self.command == "GET" else None
        if fault in ("reset", "hang"):
            self._end(wait=fault == "hang")
            return
        if isinstance(fault, int):
            body = f"<Error><Code>{CODES[fault]}</Code><Message>on order</Message></Error>".encode()
            self._answer(fault, [("Content-Length", str(len(body)))], body)
            return
        moto = http.client.HTTPConnection("127.0.0.1", self.store.moto_port)
        moto.request(self.command, self.path, headers=dict(self.headers))
        answer = moto.getresponse()
        body = answer.read()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding")]
        if fault == "garbled":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "short":
            body = body[:len(body) // 2]
            headers = [(name, str(len(body)) if name.lower() == "content-length" else value) for name, value in headers]
        half = body[:len(body) // 2] if fault in ("cut", "stall") else body[:0] if fault == "crawl" else body
        self._answer(answer.status, headers, b"" if self.command == "HEAD" else half)
        if fault == "crawl":
            _trickle(self.wfile.write, body, self.store.over)
        if fault in ("cut", "stall", "crawl"):
            self._end(wait=fault == "stall")

    do_HEAD = do_GET

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _end(self, wait: bool) -> None:
        if wait:
            self.store.over.wait(60)
        self.close_connection = True


def _trickle(write: Callable[[bytes], int], body: bytes, over: threading.Event) -> None:
    with contextlib.suppress(OSError):
        for at in range(len(body)):
            if over.is_set():
                return
            write(body[at:at + 1])
            time.sleep(0.05)

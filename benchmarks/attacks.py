"""What a coordinator takes in memory when it is attacked: real processes, mutual TLS, loopback.

    python benchmarks/attacks.py --connections 2000

One after another, and each against the same coordinator: connections that never show a certificate, at both ports;
bodies of a member that never end, at both ports; replies of a member with many and large objects; and forged deltas,
decoded in a process of their own as the server process does. The figures are peaks of resident memory over idle, by
process, and the growth of Flower's database. Everything is bounded in count and time; run it nowhere but at home.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

import tiny_world
from common import show
from fleet import Member, reply_of
from lab import Lab, open_lab, pids_of

from molehill.pki import Identity

_FORGED = """
import json, resource, struct, sys
import numpy as np
from molehill.config import MethodRef
from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill.wire.message import Delta, _checksum, decode_delta, encode_delta
from molehill.wire.packing import compress
from molehill.wire.tree import Layout, Tree
from molehill_protos.v1 import delta_pb2
n = int(sys.argv[1])
layout = Layout({Key("s", "e0", "A"): (n // 2, 1), Key("s", "e0", "B"): (1, n // 2)})
def forged(codec, params, payload, **fields):
    real = encode_delta(Delta("r", 1, "c", "b", Tree(layout), 5, {}), MethodRef(name="int8"))
    message = delta_pb2.Delta.FromString(real)
    message.tree.codec, message.tree.payload = codec, payload or message.tree.payload
    message.tree.params = json.dumps(params, sort_keys=True, separators=(",", ":"))
    message.tree.sha256 = _checksum(message.tree)
    for name, value in fields.items():
        setattr(message, name, value)
    return message.SerializeToString(deterministic=True)
density = {"alpha": 1.0, "density": 1.0, "over": "tensor", "positions": "golomb", "scale": "mean"}
head = struct.pack("<Q", n) + np.ones(2, "<f4").tobytes() + bytes(-(-n // 8))
wide = head + b"\\2\\x1f" + bytes(-(-n * 31 // 8)) + np.packbits(np.ones(n, np.uint8)).tobytes()
blobs = {
    "golomb": forged("compeft", density, wide),
    "rows": forged("int8", {"zstd": False}, b"", tokens=compress(b"\\n\\0" * 2**21)),
    "zstd": forged("fp16", {"zstd": True}, b"\\0\\0" + compress(bytes(2**27))),
}
blob = blobs[sys.argv[2]]
del blobs, wide, head
def status(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
try:
    decode_delta(blob, 2**28, layout)
except MessageError:
    pass
print(len(blob) / 1e6, (status("VmHWM") - before) / 1024)
"""


class Watch:
    """Peaks of resident memory of a coordinator's processes, in MiB over what they have at the beginning."""

    def __init__(self, lab: Lab) -> None:
        state = lab.state.resolve()
        self.pids = {"door": lab.processes["coordinator"].pid}
        self.pids |= {"SuperLink": pids_of(state, "flower-superlink")[0]}
        self.pids |= {"exchange": pids_of(state, "molehill_server.exchange")[0]}
        self.idle = {name: self.now(pid) for name, pid in self.pids.items()}

    @staticmethod
    def now(pid: int) -> float:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    @contextlib.contextmanager
    def peaks(self, found: list[str]) -> Iterator[None]:
        """Fill in the peaks while something happens."""
        peaks, ended = dict.fromkeys(self.pids, 0.0), threading.Event()

        def look() -> None:
            while not ended.wait(0.05):
                for name, pid in self.pids.items():
                    peaks[name] = max(peaks[name], self.now(pid) - self.idle[name])

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
            time.sleep(1.0)
        finally:
            ended.set()
            thread.join()
        found += [f"{peak:.0f}" for peak in peaks.values()]


def half_open(port: int, count: int) -> None:
    """Connections that never show a certificate."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(OSError):
                line = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
                line.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # the begin of a greeting
        time.sleep(2.0)


def connect(context: ssl.SSLContext, port: int) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", port), 5)
    return context.wrap_socket(raw, server_hostname="127.0.0.1")


def endless(lab: Lab, count: int, size: int) -> None:
    """Bodies of a member at the door that never end."""
    own = lab.folder / "identities" / "client-1"
    context = Identity.load(own).tls()
    with Member(own, lab.port) as member, contextlib.ExitStack() as stack:
        head = "".join(f"{name}: {value}\r\n" for name, value in member.headers().items())
        start = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {size + 1}\r\n{head}\r\n".encode()
        for _ in range(count):
            with contextlib.suppress(OSError):
                line = stack.enter_context(connect(context, lab.port))
                line.settimeout(2)
                line.sendall(start + bytes(size))
        time.sleep(2.0)


def uploads(lab: Lab, count: int) -> None:
    """Calls of a member at the exchange whose first message never ends, as many as fit each connection."""
    own = Identity.load(lab.folder / "identities" / "client-1")
    context = own.tls()
    context.set_alpn_protocols(["h2"])

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    path = "/molehill.v1.AdapterExchange/Put"
    pairs = {":method": "POST", ":scheme": "https", ":path": path, ":authority": "x", "te": "trailers"}
    pairs["content-type"] = "application/grpc"
    head = b"".join(b"\0" + text(name) + text(value) for name, value in pairs.items())
    message = b"\0" + (2**20).to_bytes(4, "big") + bytes(60_000)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(OSError):
                line = stack.enter_context(connect(context, lab.exchange_port))
                line.settimeout(2)
                line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
                for stream in range(1, 16, 2):
                    line.sendall(
                        frame(1, 4, stream, head)
                        + b"".join(
                            frame(0, 0, stream, message[at : at + 2**14]) for at in range(0, len(message), 2**14)
                        )
                    )
        time.sleep(2.0)


def hoard(lab: Lab, count: int) -> None:
    """Replies of a member with many and with large objects."""
    with Member(lab.folder / "identities" / "client-2", lab.port) as member:
        member.activate()
        for number in range(count):
            member.post("push-messages", reply_of(member.number, 30 if number % 2 else 3))
            member.push_object(bytes(10 * 2**20 if number % 2 else 2**22 - 1000) + bytes([number]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=2000, help="Half-open ones, at each port.")
    parser.add_argument("--numbers", type=int, default=5_000_000, help="Of the model whose deltas are forged.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = tiny_world.save_base(folder / "base", "bert")
        source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(40))
        config = tiny_world.config(base, source, task={"labels": list(tiny_world.LABELS)})
        rows = []
        with open_lab(folder, config, ("client-1", "client-2")) as lab:
            lab.up()
            time.sleep(2.0)
            watch = Watch(lab)
            for what, attack in (
                (f"{given.connections} half open, door", lambda: half_open(lab.port, given.connections)),
                (f"{given.connections} half open, exchange", lambda: half_open(lab.exchange_port, given.connections)),
                ("60 endless bodies of 4 MiB", lambda: endless(lab, 60, 4 * 2**20 - 1000)),
                ("60 connections, 8 endless uploads each", lambda: uploads(lab, 60)),
                ("30 replies with objects of 4 and 10 MiB", lambda: hoard(lab, 30)),
            ):
                before, found = (lab.state / "flower.db").stat().st_size, [what]
                with watch.peaks(found):
                    attack()
                rows.append([*found, f"{((lab.state / 'flower.db').stat().st_size - before) / 2**20:.1f}"])
        show("Over idle, MiB", ["attack", "door", "SuperLink", "exchange", "flower.db"], rows)
    rows = []
    for kind in ("golomb", "rows", "zstd"):
        command = [sys.executable, "-c", _FORGED, str(given.numbers), kind]
        size, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        rows.append([kind, f"{float(size):.1f}", f"{float(peak):.0f}"])
    title = f"A forged delta of a model of {given.numbers / 1e6:g} million numbers"
    show(title, ["kind", "delta, MB", "decoding, MiB"], rows)


if __name__ == "__main__":
    main()

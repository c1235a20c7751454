"""What a coordinator takes in memory when it is attacked: real processes, mutual TLS, loopback.

    python benchmarks/attacks.py --connections 2000

One after another, and each against the same coordinator, whose run of two honest machines goes on: connections that
never show a certificate, at both ports; bodies of a third machine that never end, at both ports; replies of a fourth,
with as many and as large objects as pass and with more; and forged deltas, decoded in a process of their own as the
server process does. The figures are peaks of resident memory over that before all attacks, by process, the growth of
Flower's database, and the rounds meanwhile. Everything is bounded in count and time; run it nowhere but at home.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import common  # first of all: it finds the packages

# isort: split

import numpy as np
import tiny_world
from common import grown_by, in_own_process, show
from fleet import Member, reply_of, written
from flwr.proto.fleet_pb2 import PushMessagesResponse
from lab import Lab, open_lab, pids_of

from molehill.config import MethodRef
from molehill.errors import MessageError
from molehill.pki import Identity
from molehill.wire.keys import Key
from molehill.wire.message import Delta, _checksum, decode_delta, encode_delta
from molehill.wire.packing import compress
from molehill.wire.tree import Layout, Tree
from molehill_protos.v1 import delta_pb2


def layout_of(numbers: int) -> Layout:
    return Layout({Key("s", "e0", "A"): (numbers // 2, 1), Key("s", "e0", "B"): (1, numbers // 2)})


def forged(n: int) -> dict[str, bytes]:
    """Deltas of a model of n numbers whose checksums fit, whatever is in them; the first is an honest one."""
    honest = encode_delta(Delta("r", 1, "c", "b", Tree(layout_of(n)), 5, {}), MethodRef(name="int8"))

    def changed(codec: str, params: dict[str, object], payload: bytes) -> bytes:
        message = delta_pb2.Delta.FromString(honest)
        message.tree.codec, message.tree.payload = codec, payload
        message.tree.params = json.dumps(params, sort_keys=True, separators=(",", ":"))
        message.tree.sha256 = _checksum(message.tree)
        return message.SerializeToString(deterministic=True)

    head = struct.pack("<Q", n) + np.ones(2, "<f4").tobytes() + bytes(-(-n // 8))
    wide = head + b"\2\x1f" + bytes(-(-n * 31 // 8)) + np.packbits(np.ones(n, np.uint8)).tobytes()
    dense = {"alpha": 1.0, "density": 1.0, "over": "tensor", "positions": "golomb", "scale": "mean"}
    rows = delta_pb2.Delta.FromString(honest)
    rows.tokens = compress(b"\n\0" * 2**21)
    longer = compress(bytes(2**27)).replace((2**27).to_bytes(4, "little"), (2 * n).to_bytes(4, "little"), 1)
    return {
        "honest, int8": honest,
        "remainders of 31 bits": changed("compeft", dense, wide),
        "two million rows": rows.SerializeToString(deterministic=True),
        "128 MiB in place of those declared": changed("fp16", {"zstd": True}, b"\0\0" + longer),
    }


def decode(path: Path, numbers: int) -> None:
    """Print what decoding takes, in MiB, and what becomes of the delta."""
    blob, layout, said = path.read_bytes(), layout_of(numbers), ["taken"]
    decode_delta(forged(2)["honest, int8"], 2**28, layout_of(2))  # what is loaded once does not count

    def work() -> None:
        try:
            decode_delta(blob, 2**28, layout)
        except MessageError as error:
            said[:] = [str(error)]

    print(grown_by(work), *said)


class Watch:
    """Peaks of resident memory of a coordinator's processes, in MiB over what they have at the beginning."""

    def __init__(self, lab: Lab) -> None:
        state = lab.state.resolve()
        self.pids = {"door": lab.processes["coordinator"].pid}
        self.pids |= {"SuperLink": pids_of(state, "flower-superlink")[0]}
        self.pids |= {"exchange": pids_of(state, "molehill_server.exchange")[0]}
        self.pids |= {"server": pids_of(state, "flwr-serverapp")[0]}
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
    own = lab.folder / "identities" / "third"
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
    own = Identity.load(lab.folder / "identities" / "third")
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
    """Replies of a member: one with all that passes, which the server process reads, then more and larger ones."""
    with Member(lab.folder / "identities" / "fourth", lab.port) as member:
        member.activate()
        for _ in range(300):
            if (asked := member.pull()) is not None:
                break
            time.sleep(0.1)
        said = {"run_id": asked.run_id, "reply_to_message_id": asked.message_id, "message_type": asked.message_type}
        said["ttl"] = asked.created_at + asked.ttl - time.time() - 1  # Flower takes no reply that outlives its question
        pushed, objects = written(member.number, [f"{number}{'x' * 2**20}" for number in range(14)], **said)
        session = PushMessagesResponse.FromString(member.post("push-messages", pushed).content).session_id
        for content in objects.values():
            member.push_object(content, session, asked.run_id)
        lab.until(lambda: lab.events("refused"), seconds=60)  # the run has read it, and knows what it is
        for number in range(count):
            member.post("push-messages", reply_of(member.number, 30 if number % 2 else 3, **said))
            content = bytes(10 * 2**20 if number % 2 else 2**22 - 1000) + bytes([number])
            member.push_object(content, session, asked.run_id)


def size_of(lab: Lab) -> int:
    """Bytes of Flower's database, with what is not merged into it yet."""
    return sum(path.stat().st_size for path in lab.state.glob("flower.db*"))


def main() -> None:
    common.require_command()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=2000, help="Half-open ones, at each port.")
    parser.add_argument("--numbers", type=int, default=10_000_000, help="Of the model whose deltas are forged.")
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.decode:
        decode(given.decode, given.numbers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = tiny_world.save_base(folder / "base", "bert")
        source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(40))
        config = tiny_world.config(
            base,
            source,
            run={"rounds": 1000},
            task={"labels": list(tiny_world.LABELS)},
            data={"clients": 2},
            round={"grace": 20.0},  # so long the fourth is waited for, which is asked who it is in every round
        )
        rows = []
        with open_lab(folder, config, ("client-1", "client-2")) as lab:
            for name in ("third", "fourth"):
                lab.identify(name)
            lab.up()
            lab.join_all()
            run = lab.run()
            lab.until(lambda: len(lab.events("round")) > 2, run, 180)
            watch = Watch(lab)
            for what, attack in (
                (f"{given.connections} half open, door", lambda: half_open(lab.port, given.connections)),
                (f"{given.connections} half open, exchange", lambda: half_open(lab.exchange_port, given.connections)),
                ("60 endless bodies of 4 MiB", lambda: endless(lab, 60, 4 * 2**20 - 1000)),
                ("60 connections, 8 endless uploads each", lambda: uploads(lab, 60)),
                ("a reply of 14 MiB, then 30 of 4 and 10", lambda: hoard(lab, 30)),
            ):
                size, rounds, found = size_of(lab), len(lab.events("round")), [what]
                with watch.peaks(found):
                    attack()
                lab.until(lambda rounds=rounds: len(lab.events("round")) > rounds, run, 120)  # it goes on
                grown = f"{(size_of(lab) - size) / 2**20:.1f}"
                rows.append([*found, grown, str(len(lab.events("round")) - rounds)])
                print(*rows[-1])
        show("Over idle, MiB", ["attack", *watch.pids, "flower.db", "rounds"], rows)
        rows = []
        for kind, blob in forged(given.numbers).items():
            path = folder / "delta"
            path.write_bytes(blob)
            peak, said = in_own_process("--decode", str(path), "--numbers", str(given.numbers)).split(maxsplit=1)
            rows.append([kind, f"{len(blob) / 1e6:.1f}", f"{float(peak):.0f}", said.strip().partition(".")[0]])
        title = f"A forged delta of a model of {given.numbers / 1e6:g} million numbers"
        show(title, ["kind", "delta, MB", "decoding, MiB", "what became of it"], rows)


if __name__ == "__main__":
    main()

"""How fast the exchange is beside a bare gRPC stream, and how much memory many nodes at once cost it.

    python benchmarks/exchange.py speed [--mb 100] [--rounds 7]
    python benchmarks/exchange.py load [--nodes 200] [--mb 20]

`speed` moves random bytes up and down loopback, through the exchange (mutual TLS, a digest each way, disk) and through
a gRPC service that does nothing, in the same chunks, with the same TLS and without; in turns. Beside the time that
passes, which a busy machine or a slow disk makes longer, stands the processor time of both processes. `load` has every
node connect with a certificate of its own and upload at the same time, and prints the server's peak memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from common import show
from tiny_pki import Authority

from molehill.pki import Identity
from molehill.wire.exchange import Place
from molehill.wire.local import FolderExchange
from molehill.wire.message import digest
from molehill.wire.remote import CHUNK, GrpcExchange, Patience
from molehill_server.exchange.grants import Grant, Grants

NOW = Place("bench", 1)


def bare(identity: Path, size: int) -> None:
    """The service that does nothing: one port with mutual TLS, one without."""
    chunk = bytes(CHUNK)

    async def up(_: Any, context: Any) -> bytes:
        while await context.read() is not grpc.aio.EOF:
            pass
        return b""

    async def down(_: Any, context: Any) -> None:
        for _ in range(size // CHUNK):
            await context.write(chunk)

    async def run() -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2**22)])
        methods = {
            "up": grpc.stream_unary_rpc_method_handler(up),
            "down": grpc.unary_stream_rpc_method_handler(down),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
        own = Identity.load(identity)
        credentials = grpc.ssl_server_credentials(
            [(own.key_pem(), own.certificate.pem)], own.authority.pem, require_client_auth=True
        )
        ports = server.add_secure_port("127.0.0.1:0", credentials), server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(*(f":{port}." for port in ports), flush=True)
        await server.wait_for_termination()

    asyncio.run(run())


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[int, list[int]]]:
    """A server in a process of its own: its id and its ports."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        assert running.stdout is not None
        try:
            yield running.pid, [int(port) for port in re.findall(r":(\d+)\.", running.stdout.readline())]
        finally:
            running.terminate()


def exchange(folder: Path, identity: Path) -> contextlib.AbstractContextManager[tuple[int, list[int]]]:
    """The exchange as deployed, but for the port."""
    options = {"--folder": folder, "--identity": identity, "--listen": "127.0.0.1:0"}
    return process("-m", "molehill_server.exchange", *(str(part) for pair in options.items() for part in pair))


def speed(mb: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as open_:
        folder, authority = Path(temporary), Authority(Path(temporary))
        server, node = authority.issue("server"), authority.issue("lab-1")
        blob = os.urandom(mb * 2**20)
        blobs, name = FolderExchange(folder / "exchange" / "blobs"), digest(blob)
        grants = Grants(folder / "exchange" / "grants")
        grants.give("lab-1", Grant(run=NOW.run, round=NOW.round, read=(name,), write=True, max_bytes=2**30))
        house, (port,) = open_.enter_context(exchange(folder / "exchange", server))
        other, ports = open_.enter_context(process(__file__, "bare", str(server), str(len(blob))))
        own = Identity.load(node)
        ours = open_.enter_context(GrpcExchange(f"127.0.0.1:{port}", own))
        limit = [("grpc.max_receive_message_length", 2**22)]
        credentials = grpc.ssl_channel_credentials(own.authority.pem, own.key_pem(), own.certificate.pem)
        with_tls = open_.enter_context(grpc.secure_channel(f"127.0.0.1:{ports[0]}", credentials, options=limit))
        without = open_.enter_context(grpc.insecure_channel(f"127.0.0.1:{ports[1]}", options=limit))

        def up(channel: grpc.Channel) -> Callable[[], Any]:
            return lambda: channel.stream_unary("/bare/up")(
                blob[start : start + CHUNK] for start in range(0, len(blob), CHUNK)
            )

        def down(channel: grpc.Channel) -> Callable[[], Any]:
            return lambda: b"".join(channel.unary_stream("/bare/down")(b""))

        calls = {
            ("up", "bare stream, no TLS"): up(without),
            ("up", "bare stream, TLS"): up(with_tls),
            ("up", "exchange"): lambda: ours.put(blob, NOW),
            ("down", "bare stream, no TLS"): down(without),
            ("down", "bare stream, TLS"): down(with_tls),
            ("down", "exchange"): lambda: ours.get(name),
        }
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        spent = dict.fromkeys(calls, 0.0)
        for turn in range(rounds + 1):  # the first is to warm up
            for key, call in calls.items():
                if key == ("up", "exchange"):
                    blobs.drop(name)
                process_id = house if key[1] == "exchange" else other
                before, start = time.process_time() + processor(process_id), time.perf_counter()
                call()
                if turn:
                    times[key].append(time.perf_counter() - start)
                    spent[key] += (time.process_time() + processor(process_id) - before) / rounds
        median = {key: statistics.median(each) for key, each in times.items()}
        rows = [
            [
                f"{way}: {what}",
                f"{1e3 * seconds:.0f}",
                f"{mb / seconds:.0f}",
                f"{median[way, 'bare stream, TLS'] / seconds:.2f}",
                f"{1e3 * spent[way, what]:.0f}",
                f"{spent[way, 'bare stream, TLS'] / spent[way, what]:.2f}",
            ]
            for (way, what), seconds in median.items()
        ]
        show(
            f"{mb} MiB in chunks of {CHUNK // 1024} KiB",
            ["", "ms", "MiB/s", "x bare with TLS", "processor ms", "x bare"],
            rows,
        )


def load(nodes: int, mb: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, authority = Path(temporary), Authority(Path(temporary))
        grants = Grants(folder / "exchange" / "grants")
        names = [f"lab-{number}" for number in range(nodes)]
        for name in names:
            grants.give(name, Grant(run=NOW.run, round=NOW.round, write=True, max_bytes=2**30))
        identities = [Identity.load(authority.issue(name)) for name in names]
        blob = os.urandom(mb * 2**20)
        with exchange(folder / "exchange", authority.issue("server")) as (pid, (port,)):
            before, failed = peak(pid), []

            def upload(name: str, identity: Identity) -> None:
                # The name in front makes each node's delta its own; everything else is shared to spare this process.
                with GrpcExchange(f"127.0.0.1:{port}", identity, patience=Patience(stalled=600)) as node:
                    try:
                        node.put(name.encode() + blob, NOW)
                    except Exception as error:  # noqa: BLE001 - shown below
                        failed.append(f"{name}: {error}")

            start = time.perf_counter()
            threads = [threading.Thread(target=upload, args=each) for each in zip(names, identities, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - start
            row = [f"{nodes} x {mb} MiB", f"{seconds:.1f}", f"{nodes * mb / seconds:.0f}", f"{before:.0f}"]
            row += [f"{peak(pid):.0f}", str(len(failed))]
            show("uploads at the same time", ["", "s", "MiB/s", "MiB at start", "MiB at most", "failed"], [row])
            print("\n".join(failed))


def processor(pid: int) -> float:
    """Processor time of a process, in seconds (Linux)."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def peak(pid: int) -> float:
    """Peak resident memory of a process, in MiB (Linux)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    fast = parts.add_parser("speed")
    fast.add_argument("--mb", type=int, default=100)
    fast.add_argument("--rounds", type=int, default=7)
    many = parts.add_parser("load")
    many.add_argument("--nodes", type=int, default=200)
    many.add_argument("--mb", type=int, default=20)
    inner = parts.add_parser("bare")
    inner.add_argument("identity", type=Path)
    inner.add_argument("size", type=int)
    options = vars(parser.parse_args())
    {"speed": speed, "load": load, "bare": bare}[options.pop("part")](**options)


if __name__ == "__main__":
    main()

"""How memory of one GPU can be written by a process that uses another GPU of the same host.

    python engine/benchmarks/peer_memory_links.py [--json OUT.json] [--only NAME ...]

The owner (a decode worker, say) allocates 1 GiB and hands it over a Unix socket; the writer (a
prefill worker) maps it and pushes KV into it. What separates the two processes grows from case to
case, up to what two pods of one GPU each have. Needs two GPUs, and root for the namespaces.

Every write is compared with what was sent, in memory that was overwritten before. Rates are medians
by device events, beside a plain peer copy of the same bytes by one process that sees both GPUs.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from cuda.bindings import driver
from peer_memory_methods import METHODS, Content, LinkError, describe_pointer, done

SIZES: Final = {"134 MB": 1 << 27, "1.07 GB": 1 << 30}
"""KV of 1,024 and of 8,192 tokens of Llama-3.1-8B."""
PIECES: Final = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "8 MiB": 1 << 23}
REPEATS: Final = 9
PATIENCE_SECONDS: Final = 90.0

_UNSHARE: Final = ("unshare", "--mount", "--propagation", "private")
_PID: Final = ("--pid", "--fork", "--kill-child", "--mount-proc")
CASES: Final[dict[str, tuple[bool, tuple[str, ...], bool]]] = {
    "both see both GPUs": (False, (), False),
    "one visible GPU each": (True, (), False),
    "and PID namespaces": (True, (*_UNSHARE, *_PID), False),
    "and network namespaces": (True, (*_UNSHARE, "--net"), False),
    "and IPC namespaces": (True, (*_UNSHARE, "--ipc"), False),
    "all namespaces": (True, (*_UNSHARE, *_PID, "--net", "--ipc", "--uts"), False),
    "all, own device file only": (True, (*_UNSHARE, *_PID, "--net", "--ipc", "--uts"), True),
}
"""Name: CUDA_VISIBLE_DEVICES of one GPU, the command in front, and other GPUs' files hidden."""


def send(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """One message, with a file descriptor beside it where there is one."""
    socket.send_fds(connection, [json.dumps(message).encode()], [] if fd is None else [fd])


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """The next message."""
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    if not data:
        raise LinkError("the other process has ended")
    found: dict[str, Any] = json.loads(data)
    return found, fds[0] if fds else None


def rate(num_bytes: int, call: Callable[[], object]) -> float:
    """GB/s, the median of a few calls after one that is not counted."""
    import torch

    times: list[float] = []
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return num_bytes / statistics.median(times[1:]) / 1e9


# The owner


def serve(connection: socket.socket, device: int) -> None:
    """Allocate, overwrite and compare, as the writer asks."""
    content = Content(device)
    region: Any = None
    while True:
        message, _ = receive(connection)
        fd = None
        answer: dict[str, Any] = {}
        try:
            match message["do"]:
                case "export":
                    region = METHODS[message["method"]].export(device, SIZES["1.07 GB"])
                    answer, fd = {"handle": region.handle.hex(), "size": region.size}, region.fd
                case "poison":
                    region.view().fill_(0xFF)
                    content.wait()
                case "compare":
                    expected = content.packed if message["packed"] else content.plain
                    num_bytes = message["bytes"]
                    answer = {"same": content.same(region.view()[:num_bytes], expected)}
                case "release":
                    region.release()
                case _:
                    return
        except LinkError as error:
            answer = {"error": str(error)}
        send(connection, answer, fd)


# The writer


class Writer:
    """Pushes into what the owner has exported."""

    def __init__(self, connection: socket.socket, device: int) -> None:
        self._connection = connection
        self._device = device
        self._content = Content(device)

    def _ask(self, **message: Any) -> tuple[dict[str, Any], int | None]:
        send(self._connection, message)
        answer, fd = receive(self._connection)
        if "error" in answer:
            raise LinkError(f"owner: {answer['error']}")
        return answer, fd

    def try_method(self, name: str) -> dict[str, Any]:
        """What one way of sharing does here: the rates, or the error."""
        found: dict[str, Any] = {"method": name}
        try:
            answer, fd = self._ask(do="export", method=name)
            handle = bytes.fromhex(answer["handle"])
            region = METHODS[name].open(self._device, answer["size"], handle, fd)
            if fd is not None:
                os.close(fd)
            found["torch"] = describe_pointer(region.pointer, self._device)
            found["rates"] = self._push(region.pointer)
            region.release()
            self._ask(do="release")
        except LinkError as error:
            found["error"] = str(error)
        return found

    def _push(self, target: int) -> dict[str, float]:
        source, stream, rates = self._content.plain.data_ptr(), self._content.stream, {}

        def copy(to: int, start: int, num_bytes: int) -> None:
            done(driver.cuMemcpyDtoDAsync(to, start, num_bytes, stream))

        for name, size in SIZES.items():
            self._ask(do="poison")
            rates[f"push {name}"] = rate(size, partial(copy, target, source, size))
            self._compare(size, packed=False)
        for name, piece in PIECES.items():
            count = min(256, SIZES["1.07 GB"] // piece)

            def in_pieces(piece: int = piece, count: int = count) -> None:
                for at in range(0, piece * count, piece):
                    copy(target + at, source + at, piece)

            rates[f"push, copies of {name}"] = rate(piece * count, in_pieces)
        self._ask(do="poison")
        size = SIZES["1.07 GB"]
        rates["push, pages of 8 MiB packed by a kernel"] = rate(
            size, lambda: self._content.pack_into(target)
        )
        self._compare(size, packed=True)
        spare = self._content.spare()
        rates["pull 1.07 GB"] = rate(size, lambda: copy(spare.data_ptr(), target, size))
        if not self._content.same(spare, self._content.packed):
            raise LinkError("what was read back is something else")
        return rates

    def _compare(self, num_bytes: int, *, packed: bool) -> None:
        answer, _ = self._ask(do="compare", bytes=num_bytes, packed=packed)
        if not answer["same"]:
            raise LinkError("something else has arrived")


def write(connection: socket.socket, device: int, methods: list[str]) -> None:
    """Try all methods; each result is a line on stdout."""
    writer = Writer(connection, device)
    for name in methods:
        print(json.dumps(writer.try_method(name)), flush=True)
    send(connection, {"do": "end"})


# The cases


def hide_other_gpus(minor: int, folder: Path) -> None:
    """In a mount namespace of our own: what a container runtime leaves of the device files."""

    def run(*command: str | Path) -> None:
        subprocess.run(command, check=True)

    own, empty = folder / f"dev{minor}", folder / f"empty{minor}"
    own.mkdir()
    empty.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", own)
    names = ["null", "zero", "full", "random", "urandom", "nvidiactl", "nvidia-uvm"]
    for name in (*names, "nvidia-uvm-tools", f"nvidia{minor}"):
        run("cp", "-a", f"/dev/{name}", own)
    (own / "shm").mkdir()
    driver_folder = Path("/proc/driver/nvidia")
    # Or the driver makes the missing files, as we are root.
    parameters = folder / f"params{minor}"
    text = (driver_folder / "params").read_text()
    parameters.write_text(text.replace("ModifyDeviceFiles: 1", "ModifyDeviceFiles: 0"))
    run("mount", "--bind", parameters, driver_folder / "params")
    for gpu in (driver_folder / "gpus").iterdir():
        text = (gpu / "information").read_text()
        numbers = [line.split()[-1] for line in text.splitlines() if line.startswith("Device Min")]
        if numbers != [str(minor)]:
            run("mount", "--bind", empty, gpu)
    run("mount", "--rbind", own, "/dev")


def play(arguments: argparse.Namespace) -> None:
    """Be the owner or the writer."""
    folder = Path(arguments.folder)
    if arguments.hide is not None:
        hide_other_gpus(arguments.hide, folder)
    path = str(folder / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        if arguments.role == "owner":
            connection.bind(path)
            connection.listen()
            print("listening", flush=True)
            accepted, _ = connection.accept()
            with accepted:
                serve(accepted, arguments.device)
        else:
            connection.connect(path)
            write(connection, arguments.device, arguments.methods)


def start(role: str, case: str, folder: str, methods: list[str]) -> "subprocess.Popen[str]":
    """The owner on the first GPU, or the writer on the second."""
    masked, prefix, hides = CASES[case]
    number = 0 if role == "owner" else 1
    environment = dict(os.environ)
    if masked:
        environment["CUDA_VISIBLE_DEVICES"] = "0" if hides else str(number)
    command = [*prefix, sys.executable, __file__, "--role", role, "--folder", folder]
    command += ["--device", "0" if masked else str(number), "--methods", *methods]
    if hides:
        command += ["--hide", str(number)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_pair(case: str, methods: list[str]) -> list[dict[str, Any]]:
    """What the writer has found; fewer than all methods if a process has died."""
    with tempfile.TemporaryDirectory() as folder:
        owner = start("owner", case, folder, methods)
        assert owner.stdout is not None
        told = owner.stdout.readline()
        output = errors = ""
        if told:
            writer = start("writer", case, folder, methods)
            try:
                output, errors = writer.communicate(timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                writer.kill()
                output, errors = writer.communicate()
        owner.kill()
        errors += owner.communicate()[1]
    found: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    if len(found) < len(methods):
        last = [line for line in errors.splitlines() if line.strip()][-3:]
        found.append({"method": methods[len(found)], "error": " | ".join(last) or "no answer"})
    return found


def copy_to_peer(*arguments: Any) -> None:
    """As cuMemcpyPeerAsync."""
    done(driver.cuMemcpyPeerAsync(*arguments), "cuMemcpyPeerAsync")


def measure_ceilings() -> dict[str, float]:
    """One process, both GPUs: copies within one and from one to the other."""
    import torch

    sides = [torch.empty(1 << 30, dtype=torch.uint8, device=f"cuda:{n}") for n in range(2)]
    sides[1].random_(0, 255)
    sides[0].copy_(sides[1])  # lets torch turn the peers' access on
    spare = torch.empty_like(sides[1])
    torch.cuda.set_device(1)
    stream = torch.cuda.current_stream().cuda_stream
    contexts = [done(driver.cuDevicePrimaryCtxRetain(n)) for n in range(2)]
    found = {"copy on one GPU, read and written": 2 * rate(1 << 30, lambda: spare.copy_(sides[1]))}
    for name, size in SIZES.items():
        pointers = (sides[0].data_ptr(), contexts[0], sides[1].data_ptr(), contexts[1])
        found[f"cuMemcpyPeer {name}"] = rate(
            size,
            partial(copy_to_peer, *pointers, size, stream),
        )
    if not torch.equal(sides[0].cpu(), sides[1].cpu()):
        raise LinkError("cuMemcpyPeer has changed the bytes")
    return found


def report(results: dict[str, Any]) -> None:
    """Print a table per case."""
    for case, methods in results.items():
        for found in methods:
            print(f"{case} | {found['method']} | {found.get('torch', '')} | ", end="")
            if "error" in found:
                print(found["error"])
                continue
            print("; ".join(f"{name} {value:.1f}" for name, value in found["rates"].items()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--role", choices=("owner", "writer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--device", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--hide", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        play(arguments)
        return
    ceilings = measure_ceilings()
    print("; ".join(f"{name} {value:.1f} GB/s" for name, value in ceilings.items()), flush=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for case in arguments.only:
        found: list[dict[str, Any]] = []
        while len(found) < len(METHODS):
            found += run_pair(case, list(METHODS)[len(found) :])
        results[case] = found
        report({case: found})
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps({"ceilings": ceilings, "cases": results}, indent=1))


if __name__ == "__main__":
    main()

"""The two processes of `peer-memory`: the owner of memory of one GPU, the writer from another.

`tandem bench peer-memory` starts each as `python -m tandem_bench.handoff.peer_sides`. They talk
over a Unix socket in a folder that both see.
"""

import argparse
import json
import os
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, Final

from cuda.bindings import driver

from tandem_bench.errors import LinkError
from tandem_bench.handoff.peer_methods import METHODS, SIZES, Content, describe_pointer, done, rate

PIECES: Final = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "8 MiB": 1 << 23}


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
            raise LinkError("the bytes that were read back differ from those sent")
        return rates

    def _compare(self, num_bytes: int, *, packed: bool) -> None:
        answer, _ = self._ask(do="compare", bytes=num_bytes, packed=packed)
        if not answer["same"]:
            raise LinkError("the bytes that arrived differ from those sent")


def write(connection: socket.socket, device: int, methods: list[str]) -> None:
    """Try all methods; each result is a line on stdout."""
    writer = Writer(connection, device)
    for name in methods:
        print(json.dumps(writer.try_method(name)), flush=True)
    send(connection, {"do": "end"})


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
    # Otherwise the driver makes the missing files, because we are root.
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


def main() -> None:
    """Read the command line, which `peer_memory.start` writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("owner", "writer"), required=True)
    parser.add_argument("--folder", required=True, help="Where the socket is made.")
    parser.add_argument(
        "--device", type=int, required=True, help="The GPU, as this process sees it."
    )
    parser.add_argument("--hide", type=int, help="Hide the device files of all GPUs but this one.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    play(parser.parse_args())


if __name__ == "__main__":
    main()

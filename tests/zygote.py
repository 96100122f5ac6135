"""Programs in processes of their own that need not import torch again: a third of the suite's time.

A server imports torch once, and forks for every program that a stand-in for `python` asks for. The stand-in
hands over its arguments, environment, working folder and standard streams, and exits as the program does. The
project's own modules are imported afresh by every program.

Not for tests of signals and kills, which would reach the stand-in and not the program.
"""

import array
import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path

STAND_IN = """#!{python} -SE
import array, json, os, socket, sys
argv = [a for a in sys.argv[1:] if a != "-u"]  # torchrun adds it
if not argv or argv[0] != "-m" and not argv[0].endswith(".py"):
    os.execv({python!r}, [{python!r}, *argv])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
server.sendmsg([b"+"], streams)
server.sendall(json.dumps([argv, os.getcwd(), dict(os.environ)]).encode() + bytes(1))
os._exit(ord(server.recv(1) or b"F"))
"""


@functools.cache
def stand_in() -> Path:
    """Start a server that lives as long as this process; returns a `python` that asks it."""
    folder = tempfile.TemporaryDirectory(prefix="zygote-")
    address = str(Path(folder.name, "socket"))
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    alive, ends = os.pipe()  # the server ends when nobody holds its other end any more
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS="1")
    argv = [sys.executable, __file__, str(server.fileno()), str(alive)]
    kept = [(os.POSIX_SPAWN_DUP2, number, number) for number in (server.fileno(), alive)]
    os.posix_spawn(sys.executable, argv, environment, file_actions=kept, setpgroup=0)
    os.close(alive)
    atexit.register(folder.cleanup)
    atexit.register(os.close, ends)
    file = Path(folder.name, "python")
    file.write_text(STAND_IN.format(python=sys.executable, address=address))
    file.chmod(0o755)
    return file


def serve(server: socket.socket, alive: int) -> None:
    """Fork for every program, until the tests are over."""
    while alive not in select.select([server, alive], [], [])[0]:
        asking, _ = server.accept()
        if not os.fork():
            server.close()
            os.close(alive)
            return run(asking)
        asking.close()
        while True:  # those that have ended
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    break
            except ChildProcessError:
                break


def run(asking: socket.socket) -> None:
    """Run a program in a process of its own, and tell the stand-in how it ended."""
    _, [(_, _, data)], _, _ = asking.recvmsg(1, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    asked = b""
    while not asked.endswith(bytes(1)):
        asked += asking.recv(1 << 16)
    program = os.fork()
    if program:
        ended = 0
        while not ended:
            ended, status = os.waitpid(program, os.WNOHANG)
            if select.select([asking], [], [], 0.01)[0]:  # the stand-in was killed
                os.kill(program, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status)
        try:
            asking.send(bytes([code if code >= 0 else 128 - code]))
        finally:
            os._exit(0)
    asking.close()
    (first, *more), folder, environment = json.loads(asked[:-1])
    for stream, number in enumerate(array.array("i", data)):
        os.dup2(number, stream)
        os.close(number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = environment.get("PYTHON_EXEC", sys.executable)  # for the programs that it starts
    sys.stdin, sys.stdout, sys.stderr = (
        open(stream, mode, 1, "utf-8", errors, closefd=False)  # noqa: SIM115
        for stream, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
    )
    status = 1
    try:
        if first == "-m":
            sys.argv, sys.path[0] = more, folder
            runpy.run_module(more[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *more], str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    # Not the interpreter's own end, which takes a second to take torch to pieces.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pycocotools.coco  # noqa: F401
    import torch._dynamo  # noqa: F401 (every optimizer imports it, in two seconds)
    import torch.distributed.fsdp  # noqa: F401
    import torch.distributed.run  # noqa: F401

    gc.freeze()  # pages that no collection touches stay shared
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))

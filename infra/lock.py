"""One writer per output: two runs of the same command would write every row twice."""
import contextlib
import fcntl
import os
import socket

from infra.command import BadInput, refuse


@contextlib.contextmanager
def only_writer(path):
    """Hold <path>.lock. BadInput says which process holds it if another one does.

    The system frees the lock of a process that dies; its file may stay and does no harm.
    """
    name = f"{path}.lock"
    try:
        file = open(name, "a+", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}; write to a folder that exists and can be "
                       "written to") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process before may have removed the file after we opened it.
            held = not os.path.exists(name) or not os.path.samestat(
                os.fstat(file.fileno()), os.stat(name))
        except BlockingIOError:
            held = True
        file.seek(0)
        refuse(path, (held, f"{file.read() or 'another process'} writes to it; wait until that "
                            "ends, or write to another place"))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            os.remove(name)

"""Files that are written whole or not at all, by one writer at a time."""
import contextlib
import os
import re
import socket

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

from safetensors import SafetensorError

from infra.command import BadInput


def make_folder(flag, folder):
    """Create a folder unless it is there. BadInput names the flag if that is impossible."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{flag} {folder}: {error.strerror}; give a folder that exists or can be "
                       "created") from error


def atomic_write(path, text):
    """Write a text file whole or not at all. BadInput if that is impossible."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a file in a folder that exists and can be "
                       "written to") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextlib.contextmanager
def writing(path):
    """Raise an OSError with its errno where a library has hidden it: a full disk, say.

    safetensors writes the number into its text. torch.save, given an open file, fails once more
    when it closes its archive.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else getattr(error.__context__, "errno", None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), path) from error


@contextlib.contextmanager
def only_writer(path):
    """Hold <path>.lock. BadInput says which process holds it if another one does.

    Two runs of the same command would write every row twice. The system frees the lock of a
    process that dies; its file may stay and does no harm (on Windows it always stays).
    """
    name = f"{path}.lock"
    try:
        file = open(name, "a+", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}; write to a folder that exists and can be "
                       "written to") from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:  # one byte, far behind the text, which others may then read
                os.lseek(file.fileno(), 2**20, os.SEEK_SET)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            # The process before may have removed the file after we opened it.
            held = not os.path.exists(name) or not os.path.samestat(
                os.fstat(file.fileno()), os.stat(name))
        except (BlockingIOError, PermissionError):  # as fcntl says it, and as msvcrt does
            held = True
        file.seek(0)
        if held:
            raise BadInput(f"{path}: {file.read() or 'another process'} writes to it; wait until "
                           "that ends, or write to another place")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if fcntl:  # Windows removes no open file
                os.remove(name)

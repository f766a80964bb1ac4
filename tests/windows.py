"""Runs one of the commands as on Windows: without the modules that only Unix has.

    python tests/windows.py train.py --data toy/scored.jsonl ...

Stands in for Windows' own msvcrt, and refuses what Windows refuses: to remove a file that is open
and locked, to rename onto a file that exists. The console knows cp1252 alone.
"""
import builtins
import fcntl
import io
import os
import runpy
import sys
import types

UNIX_ONLY = ("fcntl", "resource", "termios", "pty", "tty", "pwd", "grp", "readline")
LOCKED = {}  # descriptor -> (device, inode)
remove, rename, importer = os.remove, os.rename, builtins.__import__


def locking(descriptor, mode, count):
    assert mode == 2 and count == 1
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count)
    except OSError as error:
        raise PermissionError(13, "Permission denied") from error
    LOCKED[descriptor] = os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino


def remove_as_windows(path, **options):
    status = os.stat(path)
    if (status.st_dev, status.st_ino) in LOCKED.values():
        raise PermissionError(13, "The process cannot access the file", path)
    remove(path, **options)


def rename_as_windows(source, target, **options):
    if os.path.exists(target):
        raise FileExistsError(17, "Cannot create a file when that file already exists", target)
    rename(source, target, **options)


def import_as_windows(name, globals=None, locals=None, fromlist=(), level=0):
    """Of our own files alone: torch may use what it finds."""
    asked_by = (globals or {}).get("__file__") or ""
    is_ours = asked_by.startswith(ROOT) and "site-packages" not in asked_by
    if is_ours and name in UNIX_ONLY:
        raise ImportError(f"No module named {name!r}")
    if is_ours and name == "msvcrt":
        return types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    return importer(name, globals, locals, fromlist, level)


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    builtins.__import__ = import_as_windows
    os.remove, os.rename = remove_as_windows, rename_as_windows
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream.buffer, "cp1252", line_buffering=True)
                              for stream in (sys.stdout, sys.stderr))
    sys.path.insert(0, ROOT)
    sys.argv = sys.argv[1:]
    runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name="__main__")

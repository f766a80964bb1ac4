"""Folders that cannot be made and files that cannot be written, said as an error of one line."""
import contextlib
import os
import re

from safetensors import SafetensorError

from infra.command import BadInput


def make_folder(flag, folder):
    """Create a folder unless it is there. BadInput names the flag if that is impossible."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{flag} {folder}: {error.strerror}; give a folder that exists or can be "
                       "created") from error


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

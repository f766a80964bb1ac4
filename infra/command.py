"""How every command reads its flags, refuses bad input and ends.

Exit codes: 0 done; 1 failed while running; 2 bad input, told in one line on stderr; 130 Ctrl-C.
"""
import argparse
import errno
import json
import math
import os
import re
import signal
import sys
import time


class BadInput(Exception):
    """The user gave something unusable. The text is one line: what, where, and the remedy."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags, whose errors are BadInput: one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch("--[a-z_]+=--", word):  # argparse would take it for an empty list
                self.error(f"{word}: give a value")
        return super().parse_args(args, namespace)

    def error(self, message):
        raise BadInput(f"{message.removeprefix('argument ')}; see --help")


# What PyTorch holds: 64-bit integers, and float32 without loss of digits.
LARGEST, SMALLEST = {int: 2**63 - 1, float: 3e38}, 1e-37


def number(kind, is_right, range_in_words):
    """An argparse type: a finite number of a kind (int or float) in a range."""
    def parse(text):
        value = kind(text)
        for wrong, message in (
                (not (-math.inf < value < math.inf and is_right(value)),
                 f"must be {range_in_words}, not"),
                (abs(value) > LARGEST[kind], f"must be at most {LARGEST[kind]}, not"),
                (0 < abs(value) < SMALLEST, "is too close to 0:")):
            if wrong:
                raise argparse.ArgumentTypeError(f"{message} {text:.40}")
        return value

    parse.__name__ = f"{kind.__name__} ({range_in_words})"
    return parse


def at_least(lowest, kind=int):
    return number(kind, lambda value: value >= lowest, f"{lowest} or above")


def between(lowest, highest, kind=int):
    return number(kind, lambda value: lowest <= value <= highest, f"from {lowest} to {highest}")


def above_0(kind=float):
    return number(kind, lambda value: value > 0, "above 0")


def template_kwargs(text):
    """An argparse type: a JSON object of names and plain values, for a chat template."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not all(
            name.isidentifier() and isinstance(value, (bool, int, str))
            for name, value in values.items()):
        raise argparse.ArgumentTypeError(
            'must be JSON such as {"enable_thinking": false}, with true, false, whole numbers or '
            f"text as values, not {text}")
    return values


def path(text):
    """An argparse type: a path or a hub id. Empty text is an unset variable of a shell."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path, or leave the flag out")
    if any("\ud800" <= c <= "\udfff" for c in text):  # so Python shows bytes that are not UTF-8
        raise argparse.ArgumentTypeError("is not UTF-8; rename the file or folder")
    return text


def run(main):
    """Run a command's main(). BadInput exits with 2, a full disk with 1, Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):  # a character that a console lacks is no error
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # what reads our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.strerror}; make room, then give the same command again (train.py: "
              "with --resume)", file=sys.stderr)
        sys.exit(1)
    except BadInput as error:
        # Under torchrun all ranks usually fail alike. Rank 0 prints; torchrun then ends the others.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        print(f"error: {one_line(str(error))}", file=sys.stderr)  # a file's name may have two
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def printable(text):
    """Text from a model, safe for a terminal: control characters become U+FFFD, tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def one_line(text):
    return printable(" ".join(text.split()))


def first_line(error):
    return str(error).strip().split("\n")[0]

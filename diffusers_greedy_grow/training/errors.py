# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""How a script ends that cannot continue: by one line that says why, unless the fault is ours."""

import errno
import sys
from collections.abc import Callable

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tqdm.auto import tqdm


# What libraries that write files without Python's own functions say of a full disk.
DISK_IS_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "os error 28",
    "File too large",  # by a limit of the file system, or by `ulimit -f`
    "PytorchStreamWriter failed writing file",
    "unexpected pos",  # torch has noticed at the end of a file only
)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run_script(main: Callable[[], None]) -> None:
    """
    Run the `main` of a script. An error that a user can mend ends in one line, `error: ...`, and exit code 2; with `--debug`, and
    for other errors, in a traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        text = describe(error)
        if text is None or "--debug" in sys.argv:
            raise
        tqdm.write(f"error: {text}", file=sys.stderr)  # not behind a progress bar, in the same line
        sys.stderr.flush()
        sys.exit(2)


def describe(error: BaseException) -> str | None:
    """Return an error that a user can mend as one line, or None for another one."""
    if is_disk_full(error):
        return (
            f"The disk is full: {join_lines(error)}. Free some space, or lower `--checkpoints_total_limit`, and resume with the same "
            "arguments and `--resume_from_checkpoint latest`."
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return (
            f"{join_lines(error)} Log in by `hf auth login`, or set HF_TOKEN to a token that may read or write there."
        )
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return join_lines(error) or type(error).__name__
    if isinstance(error, HTTPError):  # not an OSError if there was no answer
        return f"The network cannot be reached: {join_lines(error) or type(error).__name__}. Try again later."
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether a full disk is the cause of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, Exception) and any(text in str(error) for text in DISK_IS_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def join_lines(error: BaseException) -> str:
    return " ".join(str(error).split())

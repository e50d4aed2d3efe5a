"""Start and end W&B's client without prompts, also where no server answers."""

from __future__ import annotations

import json
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil

TEARDOWN_TIMEOUT_S = 10.0
# <version>-<process id of the owner>-<where it listens>
SERVICE_VARIABLE = "WANDB_SERVICE"
GAVE_UP = ("filestream: fatal error", "runupserter: failed to upload changes")


def end_session(timeout_s: float = TEARDOWN_TIMEOUT_S) -> None:
    """Stop W&B's service process, by force where it still waits for a server that does not answer."""
    import wandb

    def tear_down() -> None:
        with suppress(Exception):  # a service that was killed is reported as an error
            wandb.teardown()

    thread = threading.Thread(target=tear_down, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if "wandb-core" in child.name():
                    child.kill()
        thread.join(timeout_s)


def open_session(mode: Literal["online", "offline"]) -> None:
    """Load W&B's global settings, silent and with this mode whatever WANDB_MODE says, and find a key without asking."""
    import wandb

    # An inherited service ends with the process that started it, such as a notebook.
    _, _, owner_and_place = os.environ.get(SERVICE_VARIABLE, "").partition("-")
    if owner_and_place.partition("-")[0] != str(os.getpid()):
        os.environ.pop(SERVICE_VARIABLE, None)
    wandb.setup(settings=wandb.Settings(silent=True, mode=mode))
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise LookupError("no API key (set WANDB_API_KEY, or log in once with: wandb login)")


def explain(error: Exception, place: str, timeout_s: float) -> str:
    """Say in one line why W&B could not be used."""
    import wandb

    text = one_line(error)
    try:
        server = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    except ValueError:
        return f"WANDB_BASE_URL={os.environ.get('WANDB_BASE_URL')!r} is no address of a server; unset it, or give a URL"
    if "deadline exceeded" in text or "did not respond in time" in text or isinstance(error, TimeoutError):
        detail = re.search(r'while retrying: (?:Post "[^"]*": )?(.*)', text)
        return f"no usable answer from {server} within {timeout_s:g} s" + (f" ({detail[1]})" if detail else "")
    if "error 401" in text or "not logged in" in text:
        return f"{server} does not accept the API key"
    if not isinstance(error, OSError) and re.search(r"permission|not found|error 40[34]", text, re.IGNORECASE):
        return f"no access to `{place}` ({text}); WANDB_ENTITY and WANDB_PROJECT name another place"
    return text


def one_line(error: Exception) -> str:
    """Write an error's message in one line, or its type where it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def find_upload_error(log: Path) -> str | None:
    """Find in the client's log why it stopped sending a run before all was sent; it reports that nowhere else.

    Args:
        log: the client's log of the run, ``debug-internal.log``, a JSON object per line.

    Returns:
        The first cause, as people read it; ``None`` where it did not stop, or where there is no log.
    """
    with suppress(OSError, ValueError), log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"level":"ERROR' in line and any(said in line for said in GAVE_UP):
                status = re.search(r"(?:failed to upload:|returned error) (\d{3})\b", line)
                return f"HTTP {status[1]}" if status else one_line(Exception(json.loads(line)["msg"]))
    return None

"""The connection to the HuggingFace hub: found out before `datasets` tries it again and again, and quiet."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5.0
"""Seconds that the hub may take to take a connection; it is tried twice, where the first try is soon over."""


def quiet_libraries() -> None:
    """Silence the log lines and bars of `datasets` and huggingface_hub: their errors are told as ours."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)


def why_unreachable(dataset: str) -> str | None:
    """Return why the hub does not answer; None where it does, or where HF_HUB_OFFLINE forbids to ask.

    Any answer counts. The library itself tries for half a minute and more before it gives up.
    """
    import datasets
    from huggingface_hub import constants, get_session

    if datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE:
        return None
    url = f"{constants.ENDPOINT}/api/datasets/{dataset}"
    for _ in range(2):
        start = time.monotonic()
        try:
            get_session().head(url, timeout=PATIENCE)
        except Exception as error:  # of two HTTP libraries, by the version of huggingface_hub
            if type(error).__name__ == "ReadTimeout":  # connected; it is slow
                return None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if time.monotonic() - start > PATIENCE / 2:
                break
            time.sleep(1.0)
        else:
            return None
    return f"{constants.ENDPOINT}: {reason}"


@contextmanager
def offline(switched: bool) -> Iterator[None]:
    """Let the libraries use what they have on the disk alone, in this process, where `switched`."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if switched:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before

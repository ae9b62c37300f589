"""The stacks that a hanging rank writes, and the report over all ranks."""

import threading
from pathlib import Path

import pytest

from dsv3.distributed.watchdog import enable_flight_recorder, format_stacks, summarize_stacks

pytestmark = pytest.mark.slow  # they look at the clock


def test_stacks_begin_with_the_place_of_the_main_thread_and_show_the_others() -> None:
    release = threading.Event()

    def waits_elsewhere() -> None:
        release.wait()

    thread = threading.Thread(target=waits_elsewhere, name="loader")
    thread.start()
    try:
        text = format_stacks()
    finally:
        release.set()
        thread.join()
    assert text.splitlines()[0].endswith("in format_stacks")
    assert text.index("thread MainThread") < text.index("thread loader")
    assert "waits_elsewhere" in text.partition("thread loader")[2]


def test_ranks_at_one_place_are_told_together_and_one_without_a_stack_is_named(tmp_path: Path) -> None:
    files = [tmp_path / f"rank-{rank}.txt" for rank in range(12)]
    for rank, path in enumerate(files[:11]):
        path.write_text(f"{'data.py:7 in read' if rank == 4 else 'c10d.py:9 in wait'}\n\nthread MainThread\n")
    assert summarize_stacks(files).splitlines() == [
        "ranks 0, 1, 2, 3, 5, 6, 7, 8 and 2 more at c10d.py:9 in wait",
        "rank 4 at data.py:7 in read",
        "rank 11 at an unknown place: it wrote no stack",
        f"stacks of all threads: {tmp_path}/rank-N.txt",
    ]


def test_what_the_user_has_set_of_the_flight_recorder_stands() -> None:
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    enable_flight_recorder(environment)
    assert environment == {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}

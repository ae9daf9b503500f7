"""How failures of threads are told."""

import errno
import os
import threading

import pytest

from accel_gpt2.cli.errors import plain_app, run


def _run_with_a_thread_that(fails: BaseException) -> None:
    app = plain_app()

    @app.command()
    def command() -> None:
        def work() -> None:
            raise fails

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    before = threading.excepthook
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["command"])
            with pytest.raises(SystemExit, match="0"):
                run(app)
    finally:
        threading.excepthook = before


def test_a_librarys_thread_on_a_full_disk_says_so_in_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """TensorBoard writes from a thread; Python would print a traceback over our message."""
    _run_with_a_thread_that(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events"))
    said = capsys.readouterr().err
    assert said.startswith("No space left on device: events. What was saved before is intact;")
    assert said.count("\n") == 1


def test_any_other_failure_of_a_thread_comes_with_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bug is not hidden."""
    _run_with_a_thread_that(ZeroDivisionError("division by zero"))
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "ZeroDivisionError: division by zero" in said

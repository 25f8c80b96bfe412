"""A refusal is one line and status 2; a bug keeps its traceback and is status 1, also when it is a ValueError."""

import pytest

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.config.load import load_recipe
from megatron_omni.parallel.sharing import PeerFailed, ReaderFailed
from megatron_omni.training.failure import report_failure


def caught(action: object) -> BaseException:
    try:
        action()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def fail(error: BaseException) -> BaseException:
    def action() -> None:
        raise error

    return caught(action)


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (caught(lambda: load_recipe("nowhere.yaml")), 2, 1),
        (fail(CheckpointError("disk full")), 1, 1),
        (caught(lambda: int("a library's ValueError")), 1, None),
        (fail(ZeroDivisionError("a bug")), 1, None),
    ],
)
def test_status_and_text(
    error: BaseException, status: int, lines: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_failure(error) == status
    text = capsys.readouterr().err
    assert str(error) in text
    if lines is None:
        assert "Traceback" in text
    else:
        assert text.startswith("error: ") and text.count("\n") == lines


def test_a_rank_that_only_knows_that_another_failed_does_not_report_a_cause(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(fail(ReaderFailed("another rank could not load its data"))) == 2
    assert capsys.readouterr().err == "[rank 0] ends: another rank could not load its data\n"
    assert report_failure(fail(PeerFailed("the leader of the engine failed"))) == 1
    assert capsys.readouterr().err == "[rank 0] ends: the leader of the engine failed\n"

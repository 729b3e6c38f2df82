import pytest

from pn_compiler.base.stopwatch import Stopwatch


def test_stages_are_announced_and_added_up() -> None:
    said: list[str] = []
    stopwatch = Stopwatch(said.append)
    for stage in ("trace", "export", "trace"):
        with stopwatch(stage):
            pass
    assert said == ["trace", "export", "trace"]
    assert [*stopwatch.seconds] == ["trace", "export"]
    assert all(seconds >= 0 for seconds in stopwatch.seconds.values())


def test_what_it_returned_does_not_change() -> None:
    stopwatch = Stopwatch()
    before = stopwatch.seconds
    with stopwatch("trace"):
        pass
    assert before == {}


def test_a_stage_that_failed_has_no_time() -> None:
    stopwatch = Stopwatch()
    with pytest.raises(ValueError, match="failed"), stopwatch("trace"):
        raise ValueError("failed")
    assert stopwatch.seconds == {}

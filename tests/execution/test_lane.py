import threading

import pytest

from gist.execution.lane import Lane


@pytest.mark.parametrize("beside", [True, False])
def test_jobs_run_in_order_and_have_ended_when_the_block_is_left(beside):
    done = []
    with Lane(beside=beside) as lane:
        for i in range(50):
            lane.submit(done.append, i)
    assert done == list(range(50))
    assert not [t for t in threading.enumerate() if t.name.startswith("gist")]


def test_the_caller_goes_on_meanwhile():
    begun, go_on = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        assert go_on.wait(10)

    with Lane(beside=True) as lane:
        future = lane.submit(job)
        assert begun.wait(10)
        assert not future.done()
        go_on.set()
        future.result()


def fail() -> None:
    raise OSError("the disk is on fire")


def test_an_error_comes_up_where_a_result_is_asked_for_and_stops_the_rest():
    done = []

    def use() -> None:
        with Lane(beside=True) as lane:
            failed, later = lane.submit(fail), lane.submit(done.append, 1)
            for future in (failed, later):
                with pytest.raises(OSError, match="on fire"):
                    future.result()

    with pytest.raises(OSError, match="on fire"):
        use()
    assert done == []


def test_an_error_that_nobody_asked_for_comes_up_in_the_end():
    with pytest.raises(OSError, match="on fire"), Lane(beside=True) as lane:
        lane.submit(fail)


def test_where_jobs_run_at_once_their_errors_come_at_once():
    with pytest.raises(OSError, match="on fire"):
        Lane(beside=False).submit(fail)


def test_the_callers_own_error_passes_and_what_had_not_begun_never_does():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert go_on.wait(10)
        done.append(1)

    def use() -> None:
        with Lane(beside=True) as lane:
            lane.submit(first)
            lane.submit(done.append, 2)
            assert begun.wait(10)
            threading.Timer(0.05, go_on.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert done == [1]
    assert not [t for t in threading.enumerate() if t.name.startswith("gist")]

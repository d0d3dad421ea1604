"""What a process finds out about others that it asks: each case of `Line`, without torch.distributed."""

import socket
import threading
import time

import pytest

import adaptlora
from adaptlora.distributed import faults


def lines(size: int, timeout: float = 5.0) -> list[faults.Line]:
    """The lines of `size` processes that are all this one."""
    barrier, told, found = threading.Barrier(size), [None] * size, [None] * size

    def construct(rank: int) -> None:
        def gather(value):
            told[rank] = value
            barrier.wait()
            values = list(told)
            barrier.wait()
            return values

        found[rank] = faults.Line(rank, gather, timeout)

    threads = [threading.Thread(target=construct, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def error(line: faults.Line, doing: str = "averaging", after: float = 0.0) -> adaptlora.ProcessError:
    with pytest.raises(adaptlora.ProcessError) as raised, line.doing(doing):
        line._since -= after
        raise RuntimeError("Connection closed by peer")
    assert str(raised.value.__cause__) == "Connection closed by peer"
    return raised.value


def ends(line: faults.Line, rank: int) -> None:
    """The process `rank` listens no more."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    line.contacts[rank] = line.contacts[rank]._replace(address="127.0.0.1", port=port)


def test_neighbours_reach_each_other():
    assert all(line.reachable for line in lines(3))


def test_one_that_listens_no_more_has_ended_and_who_ends_of_it_later_is_not_named():
    first, second, third = lines(3)
    ends(first, 1)
    found = error(first)
    assert found.processes == [1] and f"{found}".startswith("averaging: after 0.0 s: process 1 (pid ")
    assert f"{found}".endswith("has ended")
    ends(third, 0)
    assert error(third).processes == [1]
    assert f"{error(second)}".endswith(", this one: the others found that it has ended")


def test_another_process_at_that_port_is_not_the_one_that_was_there():
    first, _ = lines(2)
    first.contacts[1] = first.contacts[1]._replace(token="another")
    assert f"{error(first)}".endswith("has ended")


def test_one_that_takes_connections_and_says_nothing_does_not_answer():
    first, _ = lines(2, timeout=0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        first.contacts[1] = first.contacts[1]._replace(address="127.0.0.1", port=silent.getsockname()[1])
        assert f"{error(first)}".endswith("does not answer")


def test_who_reaches_nobody_is_cut_off_and_of_two_nobody_knows(monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("No route to host")

    three, two = lines(3, timeout=0.2), lines(2, timeout=0.2)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    found = error(three[0])
    assert found.processes == [0] and f"{found}".endswith(", this one, is cut off: none of the others can be reached")
    found = error(two[0])
    assert found.processes == [1] and f"{found}".endswith("cannot be reached (No route to host)")


def test_who_is_elsewhere_computes_or_came_late_is_said_to_live():
    first, second, third = lines(3)
    with second.doing("save_checkpoint"):
        text = f"{error(first, after=3.0)}"
    assert "process 1 (pid" in text and "is alive, and in another place (save_checkpoint) for 0." in text
    assert "process 2 (pid" in text and text.endswith("is alive, and computing for 0.0 s")
    first._said.clear(), second._said.clear(), third._said.clear()
    with second.doing("averaging"), third.doing("averaging"):
        third._since -= 3.0
        found = error(first, after=3.0)
    assert found.processes == [1] and f"{found}".endswith("came 3.0 s late")


def test_other_ranks_and_other_lengths_are_listed_for_those_that_most_do_not_have():
    group = lines(3)
    for line in group:
        line.facts = lambda: {"step": 4, "ranks": {"q": 3, "v": 2}, "launch": 1, "lengths": [50]}
    group[0].facts = lambda: {"step": 4, "ranks": {"q": 1, "v": 2}, "launch": 1, "lengths": [40]}
    with pytest.raises(adaptlora.ProcessError, match="other ranks than process 1: q 1 and not 3") as raised:
        group[2].compare("averaging")
    assert raised.value.processes == [0] and "averaging: in step 4, before gradients were sent" in f"{raised.value}"
    group = lines(3)
    for line in group:
        line.facts = lambda: {"launch": 1, "lengths": [50]}
    group[1].facts = lambda: {"launch": 1, "lengths": [40]}
    with pytest.raises(
        adaptlora.ProcessError, match=r"process 1 .* has gradients of \[40\] numbers, and process 0 of \[50\]"
    ):
        group[0].compare("averaging")


def test_a_comparison_waits_for_those_that_are_still_to_come():
    first, second = lines(2)
    first.facts = lambda: {"launch": 2, "lengths": [40]}
    second.facts = lambda: {"launch": 1, "lengths": [50]}
    waiting = threading.Thread(target=first.compare, args=("averaging",))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    second.facts = lambda: {"launch": 2, "lengths": [40]}
    waiting.join(20)
    assert not waiting.is_alive() and not first._said


def test_what_is_no_message_does_not_stop_the_listener():
    first, _ = lines(2)
    contact = first.contacts[1]
    for junk in (b"", b"\n", b"[1]\n", b"GET / HTTP/1.0\r\n\r\n", b'{"token": 1}\n'):
        with socket.create_connection((contact.address, contact.port)) as connection:
            connection.sendall(junk)
    assert "is alive, and computing" in f"{error(first)}"


def test_an_error_that_is_no_ones_says_so():
    first, second = lines(2)
    with second.doing("averaging"):
        found = error(first)
    assert found.processes == [] and "all processes answer, and it failed all the same: Connection closed" in f"{found}"

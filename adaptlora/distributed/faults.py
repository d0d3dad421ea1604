"""Which process is missing when a collective fails: each listens on a port of its own, where the others ask how it is."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

# The longest that a process is waited for when it is asked, in seconds; never longer than the collective's own timeout.
GRACE = 10.0
_HANDLING = 1.0  # what one connection may take of a listener's time
_LONGEST = 1 << 26  # bytes of a message
_CUT = "cannot be reached"
_LISTED = 5  # modules that an error lists


class ProcessError(RuntimeError):
    """
    Other processes did not do their part: they ended, stopped, cannot be reached, came too late, or have other ranks.

    Attributes: processes: the ranks of those that are at fault, as far as is known.
    """

    def __init__(self, message: str, processes=()):
        super().__init__(message)
        self.processes = list(processes)


class Contact(NamedTuple):
    """Where a process listens, and for which of its groups."""

    host: str
    pid: int
    address: str
    port: int
    token: str = ""


def _own_address() -> str:
    """An address of this machine on the interface that gloo uses."""
    interface, master = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0], os.environ.get("MASTER_ADDR")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface:
            found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()))  # SIOCGIFADDR
            return socket.inet_ntoa(found[20:24])
        # Nothing is sent: the kernel chooses the route.
        probe.connect((master or socket.gethostname(), 9))
        return probe.getsockname()[0]
    return "127.0.0.1"


def _read(connection: socket.socket) -> dict:
    """A message: one line of JSON.  Raises: OSError, ValueError (closed before its end, no message)."""
    with connection.makefile("rb") as stream:
        line = stream.readline(_LONGEST)
    if not line.endswith(b"\n"):
        raise ValueError("closed before the end of the message")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"a message must be a dict, got {type(message).__name__}")
    return message


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


class _Listener:
    """Answers for all groups of this process, {token: Line}, on a thread that lives as long as the process."""

    def __init__(self):
        self.lines = weakref.WeakValueDictionary()
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.contact = Contact(socket.gethostname(), os.getpid(), _own_address(), self._socket.getsockname()[1])
        threading.Thread(target=self._serve, name="adaptlora-faults", daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            # Whoever asks may have gone, or is no process of ours.
            with contextlib.suppress(OSError, ValueError), connection:
                connection.settimeout(_HANDLING)
                message = _read(connection)
                line = self.lines.get(message.get("token"))
                _send(connection, {} if line is None else line.answer(message))

    def close(self) -> None:
        self._socket.close()


_listener: _Listener | None = None
_lock = threading.Lock()


def _listen() -> _Listener:
    global _listener
    with _lock:
        if _listener is None:
            _listener = _Listener()
        return _listener


def _after_fork() -> None:
    """A forked child has the socket and not the thread: open there, it would outlive this process."""
    global _listener, _lock
    if _listener is not None:
        _listener.close()
    _listener, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _ask(contact: Contact, message: dict, until: float) -> dict | str:
    """What the process there answers before the time `until`, or what is wrong with it."""
    wrong = _CUT
    while (left := until - time.monotonic()) > 0:
        try:
            wrong = _CUT
            with socket.create_connection((contact.address, contact.port), timeout=left) as connection:
                wrong = "does not answer"
                _send(connection, message | {"token": contact.token})
                connection.settimeout(max(0.01, until - time.monotonic()))
                # Another process that has this port now knows no such token.
                return _read(connection) or "has ended"
        except ConnectionRefusedError:
            return "has ended"
        except TimeoutError:
            continue
        except (OSError, ValueError) as error:
            wrong = f"{wrong} ({error})"
        time.sleep(0.05)
    return wrong


def _odd(values: dict[int, object]) -> list[int]:
    """The processes that have another value than most, or than the first of them where there is no most."""
    texts = {rank: json.dumps(value, sort_keys=True) for rank, value in sorted(values.items())}
    usual = Counter(texts.values()).most_common(1)[0][0]
    return [rank for rank, text in texts.items() if text != usual]


class Line:
    """
    What a process tells the others of its group about itself, and asks them.

    Args:
        rank: this process in the group.   gather: value -> the values of all, by rank; all processes construct one at the same time.
        timeout: of the group's collectives, in seconds.
    Attributes:
        facts: called for what all should have alike: {"step": int, "ranks": {module: rank}, "launch": int, "lengths": [int, …]}.
        reachable: whether every process reached its neighbour, and so who is missing can be told.
    """

    def __init__(self, rank: int, gather: Callable[[object], list], timeout: float):
        self.rank, self.timeout, self.grace = rank, timeout, min(GRACE, timeout)
        self.facts: Callable[[], dict] = dict
        self._doing, self._since = "", time.monotonic()
        # What others found before they raised: {process: {culprit: what}}.
        self._said: dict[int, dict[str, str]] = {}
        listener, token = _listen(), secrets.token_hex(8)
        listener.lines[token] = self
        self.contacts: list[Contact] = gather(listener.contact._replace(token=token))
        neighbour = self.contacts[(rank + 1) % len(self.contacts)]
        self.reachable = all(gather(isinstance(self._ask([neighbour])[0], dict)))

    def _ask(self, contacts: list[Contact], said: dict | None = None, seconds: float | None = None) -> list[dict | str]:
        """The answers, each a state or what is wrong; all asked at once."""
        message = {"process": self.rank, "said": said}
        until = time.monotonic() + (self.grace if seconds is None else seconds)
        if not contacts:
            return []
        with ThreadPoolExecutor(min(32, len(contacts))) as pool:
            return list(pool.map(lambda contact: _ask(contact, message, until), contacts))

    def answer(self, message: dict) -> dict:
        """What this process answers to one that asks, which may say what it found."""
        if message.get("said"):
            self._said[int(message["process"])] = message["said"]
        return {"doing": self._doing, "seconds": time.monotonic() - self._since, **self.facts()}

    @contextlib.contextmanager
    def doing(self, what: str):
        """A block in which other processes are waited for.  Raises: ProcessError for a RuntimeError in it."""
        self._doing, self._since = what, time.monotonic()
        try:
            yield
        except ProcessError:
            raise
        except RuntimeError as error:
            raise self._failed(error) from error
        finally:
            self._doing, self._since = "", time.monotonic()

    def _others(self) -> list[int]:
        return [rank for rank in range(len(self.contacts)) if rank != self.rank]

    def _failed(self, error: RuntimeError) -> ProcessError:
        seconds = time.monotonic() - self._since
        others = self._others()
        answers = dict(zip(others, self._ask([self.contacts[rank] for rank in others]), strict=True))
        return self._error(self._wrong(answers, seconds), answers, f"after {seconds:.1f} s", error)

    def _error(self, wrong: dict[int, str], answers: dict[int, dict | str], when: str, cause=None) -> ProcessError:
        """The error, of which all that can be are told before it is raised: they would take this process for the culprit."""
        step = self.facts().get("step")
        where = when if step is None else f"in step {step}, {when}"
        found = "; ".join(f"{self._name(rank)} {what}" for rank, what in wrong.items())
        told = found or f"all processes answer, and it failed all the same: {cause}"
        error = ProcessError(f"{self._doing}: {where}: {told}", wrong)
        error.__cause__ = cause
        living = [self.contacts[rank] for rank, answer in answers.items() if answer != "has ended"]
        self._ask(living, {f"{rank}": what for rank, what in wrong.items()}, min(1.0, self.grace))
        _report(error)
        return error

    def _name(self, rank: int) -> str:
        contact = self.contacts[rank]
        this = "" if rank != self.rank else ", this one: the others found that it" if self._said else ", this one,"
        return f"process {rank} (pid {contact.pid} on {contact.host}){this}"

    def _wrong(self, answers: dict[int, dict | str], seconds: float) -> dict[int, str]:
        """{process at fault: what is wrong with it}, from what the others answered while this one waited for `seconds`."""
        if self._said:
            # Who ended after that did so because of it.
            return {int(rank): what for said in self._said.values() for rank, what in said.items()}
        missing = {rank: answer for rank, answer in answers.items() if isinstance(answer, str)}
        if len(missing) == len(answers) > 1 and all(what.startswith(_CUT) for what in missing.values()):
            return {self.rank: "is cut off: none of the others can be reached"}
        return missing or self.differences(answers) or self._late(answers, seconds)

    def differences(self, answers: dict[int, dict | str]) -> dict[int, str]:
        """Those whose ranks, or lengths of gradients, are not those of the others."""
        states = {rank: state for rank, state in answers.items() if isinstance(state, dict)} | {self.rank: self.facts()}
        ranks = {rank: state.get("ranks") for rank, state in states.items()}
        odd = _odd(ranks)
        if odd:
            usual = min(rank for rank in ranks if rank not in odd)
            return {rank: f"has other ranks than process {usual}: {_listed(ranks[rank], ranks[usual])}" for rank in odd}
        # A process that has launched less is still to come.
        newest = max(state.get("launch", 0) for state in states.values())
        lengths = {rank: state.get("lengths") for rank, state in states.items() if state.get("launch", 0) == newest}
        odd = _odd(lengths)
        usual = min(rank for rank in lengths if rank not in odd)
        return {
            rank: f"has gradients of {lengths[rank]} numbers, and process {usual} of {lengths[usual]}" for rank in odd
        }

    def _late(self, answers: dict[int, dict], seconds: float) -> dict[int, str]:
        """Those that were elsewhere, or came when the others had waited for long."""
        found = {}
        for rank, state in answers.items():
            place = f"in another place ({state['doing']})" if state["doing"] else "computing"
            if state["doing"] != self._doing:
                found[rank] = f"is alive, and {place} for {state['seconds']:.1f} s"
            elif seconds - state["seconds"] > seconds / 2:
                found[rank] = f"came {seconds - state['seconds']:.1f} s late"
        return found

    def compare(self, doing: str) -> None:
        """
        Wait until the others have launched as often as this process, and see that they have gradients of the same lengths: gloo ends a
        process that receives more than it expects. Nothing is sent by collectives; the others need not take part.

        Raises: ProcessError.
        """
        own = self.facts()["launch"]
        waiting, answers, start = self._others(), {}, time.monotonic()
        with self.doing(doing):
            while waiting:
                found = self._ask([self.contacts[rank] for rank in waiting])
                answers |= dict(zip(waiting, found, strict=True))
                waiting = [r for r in waiting if isinstance(answers[r], dict) and answers[r].get("launch", 0) < own]
                seconds = time.monotonic() - start
                wrong = {rank: answer for rank, answer in answers.items() if isinstance(answer, str)}
                if wrong or self._said or (waiting and seconds > self.timeout):
                    raise self._error(self._wrong(answers, seconds), answers, f"after {seconds:.1f} s")
                time.sleep(0.01 if waiting else 0)
            wrong = self.differences(answers)
            if wrong:
                raise self._error(wrong, answers, "before gradients were sent")


def _listed(ranks: dict[str, int], usual: dict[str, int]) -> str:
    names = [name for name in {**usual, **ranks} if ranks.get(name) != usual.get(name)]
    shown = ", ".join(f"{name} {ranks.get(name)} and not {usual.get(name)}" for name in names[:_LISTED])
    return shown + (f", and {len(names) - _LISTED} more modules" if len(names) > _LISTED else "")


def _report(error: ProcessError) -> None:
    """Into the file that torchrun reads when a worker ends, also of a script without @record."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)

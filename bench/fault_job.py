"""A small training job of several processes, one of which has a fault that is drawn: what bench/fault_trials.py disturbs and compares."""

import ctypes
import json
import os
import random
import signal
import socket
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # what the first optimizer imports
import torch.distributed as dist
from network import INTERFACE, Switch, address, own_network
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trials import Journal, digest, start_random, wait

import adaptlora
from adaptlora.distributed import decisions, distribution, setup  # noqa: F401 - before the fork, not after it

STEPS = 8
ROWS = 12  # of a global batch
CLIP = 5  # NormAL's one rank change; La-LoRA's ranks may change in every step
SIZES = (2, 3, 4)
METHODS = ("normal", "lalora")
ENDING = ("kill-step", "kill-clip", "kill-save", "stop", "cut")  # the job ends with an error
GOING_ON = ("pause", "slow")
MOMENTS = ("decision", "agreement", "commit")


class Case:
    """What a trial does, drawn: the fault, in which process and when, and with how many processes the run goes on."""

    def __init__(self, number: int, seed: int, kinds, timeout: float):
        draw = random.Random(f"{seed} {number}")
        self.number, self.timeout = number, timeout
        self.kind, self.method, self.wrapped = draw.choice(kinds), draw.choice(METHODS), draw.random() < 0.5
        self.size = draw.choice(SIZES)
        self.victim = draw.randrange(self.size)
        self.step = draw.randrange(1, STEPS)
        self.phase = draw.choice(("step", "clip", "save"))
        if self.kind.startswith("kill"):
            self.phase = self.kind.removeprefix("kill-")
        if self.kind == "kill-clip" and self.method == "normal":
            self.step = CLIP - 1
        if self.kind == "cut":
            self.step = min(self.step, STEPS - 4)  # pulling the cable takes about a step
        self.delay = draw.uniform(0, 0.015)
        self.moment = draw.choice(MOMENTS)
        self.resumed_on = self.size if draw.random() < 0.7 else draw.choice([n for n in SIZES if n != self.size])

    def described(self) -> dict:
        return {**vars(self), "delay": round(self.delay, 4)}


def make(method: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    common = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], "modules_to_save": ["4"]}
    config = {
        "normal": adaptlora.NormALConfig(**common, target_r=2, t_p=2, t_c=CLIP),
        "lalora": adaptlora.LaLoRAConfig(**common, gamma=4.0),
    }[method]
    return adaptlora.attach(model, config)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(ROWS, 9, generator=generator, dtype=torch.float64)
    return x, torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)


def train(method: str, wrapped: bool, timeout: float, folder: Path, journal: Journal, slowed: float = 0.0) -> None:
    """The loop of one process, to the end; leaves its digest and the final state beside `folder`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    adapter = make(method)
    model = DistributedDataParallel(adapter.model) if wrapped else adapter.model
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    adapter.distribute(model, timeout=timedelta(seconds=timeout))
    start_random()
    path, step = adaptlora.last_checkpoint(folder, processes=adapter.processes), 0
    if path is not None:
        step, _ = adaptlora.load_checkpoint(path, adapter, optimizer)
    begun, start = step, time.monotonic()
    while step < STEPS:
        journal.phase("step", step)
        time.sleep(slowed)
        x, y = (part[rank * ROWS // size : (rank + 1) * ROWS // size] for part in batch(step))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        penalty = adapter.penalty()
        if penalty.requires_grad:
            with adapter.no_sync():
                penalty.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = adapter.processes.total([loss.item()], doing="averaging the loss")[0] / size
        journal.phase("clip", step)
        adapter.step(loss)
        step += 1
        journal.loss(step, total)
        journal.phase("save", step - 1)
        adaptlora.save_checkpoint(folder, adapter, optimizer, step=step)
    state = {"ranks": adapter.ranks(), "tensors": [p.detach() for p in adapter.parameters()]}
    state["tensors"] += [value for p in adapter.parameters() for value in optimizer.state[p].values()]
    state["seconds"] = (time.monotonic() - start) / max(1, step - begun)
    torch.save(state, folder.with_suffix(f".state{rank}"))
    folder.with_suffix(f".digest{rank}").write_text(json.dumps(digest(adapter, optimizer)), encoding="utf-8")


def _die_in_change(step: int, moment: str, journal: Journal) -> None:
    """Kill this process when ranks are decided on, from `step` on: before the decision, before all agree, or before it is carried out."""
    decide, compare = decisions.decide, decisions.Agreement._compare

    def kill() -> None:
        if journal.step() >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_decide(*arguments):
        kill()
        return decide(*arguments)

    def dying_compare(*arguments):
        if moment == "agreement":
            kill()
        compare(*arguments)
        kill()

    if moment == "decision":
        distribution.decide = dying_decide
    else:
        decisions.Agreement._compare = dying_compare


class Job:
    """Forked processes that train together.  Attributes: pids, journals, by rank."""

    def __init__(self, size: int, folder: Path, case: Case, disturbed: bool):
        self.size, self.folder, self.case = size, folder, case
        self.journals = [Journal(folder.with_suffix(f".losses{rank}")) for rank in range(size)]
        self.switch = Switch() if disturbed and case.kind == "cut" else None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pids = [self._spawn(rank, port, disturbed) for rank in range(size)]

    def _spawn(self, rank: int, port: int, disturbed: bool) -> int:
        self.journals[rank].phase("start")
        plugged, plug = os.pipe()
        pid = os.fork()
        if pid:
            os.close(plugged)
            if self.switch is not None:
                self.switch.plug(rank, pid)
            os.close(plug)
            return pid
        status = 1
        try:
            os.close(plug)
            warnings.simplefilter("ignore")
            if self.switch is not None:
                own_network()
                os.environ |= {"MASTER_ADDR": address(0), "GLOO_SOCKET_IFNAME": INTERFACE}
            else:
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            os.read(plugged, 1)
            os.environ |= {"MASTER_PORT": f"{port}", "RANK": f"{rank}", "WORLD_SIZE": f"{self.size}"}
            self._work(rank, disturbed and rank == self.case.victim)
            status = 0
        except BaseException as error:
            found = {"processes": getattr(error, "processes", None), "text": f"{type(error).__name__}: {error}"}
            found["at"] = time.monotonic()
            self._error(rank).write_text(json.dumps(found), encoding="utf-8")
        finally:
            # As a script ends: what hangs there would hang a job.
            ctypes.pythonapi.Py_Exit(status)

    def _work(self, rank: int, victim: bool) -> None:
        case = self.case
        if victim and case.kind == "kill-clip":
            _die_in_change(case.step, case.moment, self.journals[rank])
        slowed = case.slowed if victim and case.kind == "slow" else 0.0
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        train(case.method, case.wrapped, case.timeout, self.folder, self.journals[rank], slowed)
        dist.destroy_process_group()

    def _error(self, rank: int) -> Path:
        return self.folder.with_suffix(f".error{rank}")

    def error(self, rank: int) -> dict:
        file = self._error(rank)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"processes": None, "text": "none"}

    def await_phase(self) -> None:
        """Until the victim is where the case wants it, or has ended."""
        journal = self.journals[self.case.victim]
        while (journal.step(), journal.where()) < (self.case.step, "") or (
            journal.step() == self.case.step and journal.where() != self.case.phase
        ):
            if os.waitid(os.P_PID, self.pids[self.case.victim], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.0002)
        time.sleep(self.case.delay)

    def close(self) -> None:
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue
        if self.switch is not None:
            self.switch.close()

    def ended(self, ranks, seconds: float) -> dict[int, int | None]:
        """{rank: exit status, None if it still runs after `seconds`}"""
        end = time.monotonic() + seconds
        return {rank: wait(self.pids[rank], max(0.0, end - time.monotonic())) for rank in ranks}

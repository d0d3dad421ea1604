"""
Training by several processes of which one is killed, stopped, slowed or cut off: the others end with an error that names it, every
checkpoint is whole, and the run that goes on ends as the one that nobody disturbed: bit for bit on as many processes, to 1e-10 on others.

    python bench/fault_trials.py --trials 100 --json
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo  # what the first optimizer imports
import torch.distributed as dist
from network import INTERFACE, Switch, address, own_network, permitted
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trials import Journal, digest, start_random, wait

import adaptlora
from adaptlora.distributed import decisions, faults

STEPS = 8
ROWS = 12  # of a global batch
CLIP = 5  # NormAL's one rank change; La-LoRA's ranks may change in every step
SIZES = (2, 3, 4)
METHODS = ("normal", "lalora")
ENDING = ("kill-step", "kill-clip", "kill-save", "stop", "cut")  # the job ends with an error
GOING_ON = ("pause", "slow")
MOMENTS = ("decision", "agreement", "commit")
RESULTS = Path(__file__).parent / "results" / "fault_trials.json"


class Case:
    """What a trial does, drawn: the fault, in which process and when, and with how many processes the run goes on."""

    def __init__(self, draw: random.Random, kinds, timeout: float):
        self.timeout = timeout
        self.kind, self.method, self.wrapped = draw.choice(kinds), draw.choice(METHODS), draw.random() < 0.5
        self.size = draw.choice(SIZES)
        self.victim = draw.randrange(self.size)
        self.step = draw.randrange(1, STEPS)
        self.phase = draw.choice(("step", "clip", "save"))
        if self.kind.startswith("kill"):
            self.phase = self.kind.removeprefix("kill-")
        if self.kind == "kill-clip" and self.method == "normal":
            self.step = CLIP - 1
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
    """Kill this process in the first rank change from `step` on: before the decision, before all agree, or before it is carried out."""
    broadcast, reached = decisions.decide, decisions.Agreement.reached

    def kill() -> None:
        if journal.step() >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_decide(*arguments):
        kill()
        return broadcast(*arguments)

    def dying_reached(agreement, ranks):
        if moment == "agreement":
            kill()
        reached(agreement, ranks)
        kill()

    if moment == "decision":
        from adaptlora.distributed import distribution

        distribution.decide = dying_decide
    else:
        decisions.Agreement.reached = dying_reached


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


class Reference:
    """The run that nobody disturbs, of a method, loop and number of processes.  Attributes: losses; seconds of a step."""

    def __init__(self, case: Case, folder: Path):
        self.size, self.folder = case.size, folder
        job = Job(case.size, folder, case, disturbed=False)
        statuses = job.ended(range(case.size), 600)
        job.close()
        if any(statuses.values()):
            raise RuntimeError(f"the undisturbed run of {case.described()} ended with {statuses}: {job.error(0)}")
        self.losses = job.journals[0].losses()
        self.seconds = torch.load(folder.with_suffix(".state0"))["seconds"]

    def faults(self, job: Job) -> list[str]:
        """What differs in the end of a run that was disturbed and ended on `job.size` processes."""
        found, losses = [], job.journals[0].losses()
        if job.size == self.size:
            different = [step for step in self.losses if losses.get(step) != self.losses[step]]
            for rank in range(self.size):
                files = [folder.with_suffix(f".digest{rank}") for folder in (job.folder, self.folder)]
                one, other = (json.loads(file.read_text(encoding="utf-8")) for file in files)
                found += [f"the final {part} of process {rank} differs" for part in other if one[part] != other[part]]
        else:
            different = [step for step in self.losses if not _near(losses.get(step, set()), self.losses[step])]
            for rank in range(job.size):
                one, other = (
                    torch.load(folder.with_suffix(f".state{n}")) for folder, n in ((job.folder, rank), (self.folder, 0))
                )
                pairs = zip(one["tensors"], other["tensors"], strict=True)
                if one["ranks"] != other["ranks"] or not all(torch.allclose(*p, rtol=1e-10, atol=1e-10) for p in pairs):
                    found.append(f"the final state of process {rank} differs")
        return found + ([f"losses differ at steps {different}"] if different else [])


def _near(found: set[str], expected: set[str]) -> bool:
    (wanted,) = map(float.fromhex, expected)
    return bool(found) and all(abs(float.fromhex(text) - wanted) <= 1e-10 * abs(wanted) for text in found)


def broken(folder: Path, logged: int) -> list[str]:
    """What is wrong with the checkpoints of a run that has logged that many steps."""
    found, whole = [], [0]
    for path in folder.glob("checkpoint-*"):
        try:
            adaptlora.check_checkpoint(path)
            whole.append(int(path.name.removeprefix("checkpoint-")))
        except (ValueError, FileNotFoundError) as error:
            found.append(f"{error}")
    if max(whole) < logged - 1:
        found.append(f"step {logged} was reached, and checkpoint-{max(whole)} is the last")
    return found


def disturb(case: Case, job: Job, slack: float) -> tuple[list[str], list[float]]:
    """Do to a running job what the case says.  Returns: what went wrong, and how long the others took to raise and to end."""
    victim, pid = case.victim, job.pids[case.victim]
    others = [rank for rank in range(case.size) if rank != victim]
    limit = case.timeout + min(faults.GRACE, case.timeout) + slack
    if case.kind not in ("slow", "kill-clip"):
        job.await_phase()
    start = time.monotonic()
    if case.kind in ("kill-step", "kill-save"):
        os.kill(pid, signal.SIGKILL)
    elif case.kind in ("stop", "pause"):
        os.kill(pid, signal.SIGSTOP)
    elif case.kind == "cut":
        job.switch.pull(victim)
    if case.kind == "pause":
        time.sleep(case.timeout / 4)
        os.kill(pid, signal.SIGCONT)
    if case.kind in GOING_ON:
        statuses = job.ended(range(case.size), 600)
        found = [
            f"process {rank} ended with {status}: {job.error(rank)['text']}"
            for rank, status in statuses.items()
            if status
        ]
        return found, []
    if case.kind == "kill-clip":
        wait(pid)
        start = time.monotonic()
    found, statuses = [], job.ended(others, limit)
    seconds = [max(job.error(rank).get("at", start) for rank in others) - start, time.monotonic() - start]
    if case.kind == "stop":
        os.kill(pid, signal.SIGCONT)
    if case.kind in ("stop", "cut"):
        statuses |= job.ended([victim], limit)
    for rank, status in statuses.items():
        error = job.error(rank)
        named = [1 - victim] if rank == victim and case.size == 2 and case.kind == "cut" else [victim]
        if status is None:
            found.append(f"process {rank} had not ended after {limit:.0f} s")
        elif error["processes"] != named or not error["text"].startswith("ProcessError"):
            found.append(f"process {rank} ended with {status}, and must name {named}: {error['text']}")
    return found, seconds


def trial(case: Case, references: dict, place: Path, slack: float) -> dict:
    key = case.method, case.wrapped, case.size
    if key not in references:
        references[key] = Reference(case, place / "-".join(map(str, ("reference", *key))))
    reference = references[key]
    case.slowed = min(9 * reference.seconds, case.timeout / 2) if case.kind == "slow" else 0.0
    folder, start = Path(tempfile.mkdtemp(dir=place)) / "run", time.monotonic()
    job = Job(case.size, folder, case, disturbed=True)
    try:
        found, seconds = disturb(case, job, slack)
        where = job.journals[case.victim].where()
        errors = [job.error(rank)["text"] for rank in range(case.size)]
    finally:
        job.close()
    if not found and case.kind in ENDING:
        found = broken(folder, len(job.journals[0].losses()))
        job = Job(case.resumed_on, folder, case, disturbed=False)
        statuses = job.ended(range(case.resumed_on), 600)
        job.close()
        found += [
            f"resumed, process {rank} ended with {s}: {job.error(rank)['text']}" for rank, s in statuses.items() if s
        ]
    if not found:
        found = reference.faults(job)
    if not found:
        shutil.rmtree(folder.parent, ignore_errors=True)
    told = {
        "raised_and_ended_after": [round(t, 2) for t in seconds],
        "seconds": round(time.monotonic() - start, 2),
        "errors": errors,
    }
    return {**case.described(), "where": where, **told, "faults": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kind", choices=(*ENDING, *GOING_ON), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=4.0, help="of collectives, in seconds")
    parser.add_argument(
        "--slack", type=float, default=20.0, help="what a busy machine may add to how long an end takes"
    )
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name} beside the other results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = options.kind or [kind for kind in (*ENDING, *GOING_ON) if kind != "cut" or permitted()]
    draw, references, done = random.Random(options.seed), {}, []
    place = Path(tempfile.mkdtemp(prefix="fault-trials-"))
    for _ in range(options.trials):
        done.append(trial(Case(draw, kinds, options.timeout), references, place, options.slack))
        print(json.dumps(done[-1], ensure_ascii=False), flush=True)
    lost = sum(bool(result["faults"]) for result in done)
    print(f"{len(done)} trials, {lost} with faults")
    if not lost:
        shutil.rmtree(place, ignore_errors=True)
    if options.json:
        from harness import environment

        report = {"environment": environment(), "timeout": options.timeout, "seed": options.seed, "trials": done}
        RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()

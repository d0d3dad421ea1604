"""
Training by several processes of which one is killed, stopped, slowed or cut off: the others end with an error that names it, every
checkpoint is whole, and the run that goes on ends as the one that nobody disturbed: bit for bit on as many processes, to 1e-10 on others.

    python bench/fault_trials.py --trials 100 --json
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fault_job import ENDING, GOING_ON, Case, Job
from network import permitted
from trials import wait

import adaptlora
from adaptlora.distributed import faults

RESULTS = Path(__file__).parent / "results" / "fault_trials.json"


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
    parser.add_argument("--first", type=int, default=0, help="number of the first trial; each is drawn by its own")
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
    references, done = {}, []
    place = Path(tempfile.mkdtemp(prefix="fault-trials-"))
    for number in range(options.first, options.first + options.trials):
        case = Case(number, options.seed, kinds, options.timeout)
        done.append(trial(case, references, place, options.slack))
        print(json.dumps(done[-1], ensure_ascii=False), flush=True)
    lost = sum(bool(result["faults"]) for result in done)
    print(f"{len(done)} trials, {lost} with faults")
    if not lost:
        shutil.rmtree(place, ignore_errors=True)
    if options.json:
        write(done, options.seed, options.timeout)
    sys.exit(lost > 0)


def write(done: list[dict], seed: int, timeout: float) -> None:
    """Of every kind how often, in which phases, how long until the last of the others raised, what one said; then all trials."""
    from adaptlora.benchmarks.harness import environment

    kinds = {}
    for kind in sorted({result["kind"] for result in done}):
        of_kind = [result for result in done if result["kind"] == kind]
        times = [result["raised_and_ended_after"] for result in of_kind]
        said = next((text for text in of_kind[0]["errors"] if text != "none"), None)
        kinds[kind] = {
            "trials": len(of_kind),
            "where": dict(Counter(result["where"] for result in of_kind)),
            "slowest_raised_and_ended_after": [max(column) for column in zip(*times, strict=True)],
            "resumed_on_another_number": sum(result["resumed_on"] != result["size"] for result in of_kind),
            "faults": [fault for result in of_kind for fault in result["faults"]],
            "an_error": said,
        }
    fields = ["number", "kind", "method", "wrapped", "size", "victim", "step", "where", "resumed_on", "raised_and_ended_after"]  # fmt: skip
    trials = [{field: result[field] for field in fields} for result in done]
    report = {"environment": environment(), "seed": seed, "timeout": timeout, "kinds": kinds, "trials": trials}
    RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

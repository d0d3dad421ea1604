"""How long one call takes, on a CPU and on a CUDA GPU: everything that a benchmark does differently there is in here."""

import time
from collections.abc import Callable

import torch

Provider = Callable[[], object]


class CpuTimer:
    """Seconds by the clock."""

    device = torch.device("cpu")

    def ready(self, name: str, run: Provider) -> Provider:
        """What to time instead of `run`: itself."""
        return run

    def seconds(self, run: Provider) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaTimer:
    """
    Seconds between two events of the GPU around a call that finds the L2 cache cold: a buffer larger than it is cleared before.

    Args:
        graphs: capture each provider in a CUDA graph and time its replays, which leaves out the calls of Python and of the driver. Not
            for providers with a `prepare` or that decide something in Python.
    Attributes: not_captured: {provider: why it was timed as it is}.
    """

    def __init__(self, device: torch.device | str = "cuda", *, graphs: bool = False):
        self.device = torch.device(device)
        self.graphs = graphs
        self.not_captured: dict[str, str] = {}
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flush = torch.empty(2 * l2, dtype=torch.uint8, device=self.device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ready(self, name: str, run: Provider) -> Provider:
        """The replay of a graph of `run` where one can be captured, else `run`."""
        if not self.graphs:
            self.not_captured[name] = "its benchmark times whole calls, with what they decide in Python or wait for"
            return run
        if hasattr(run, "prepare"):
            self.not_captured[name] = "it is prepared anew before each call"
            return run
        current = torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[current.device.index]
        drawn = generator.clone_state()
        try:
            return self._captured(run, current)
        except RuntimeError as error:
            # After an illegal call the capture's own end raises too: that error says nothing, hides the first one, and leaves the capture's
            # stream the current one and the generator of random numbers waiting for a graph.
            first = error.__context__ or error
            self.not_captured[name] = str(first).strip().splitlines()[0][:200]
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(drawn)
            torch.cuda.synchronize(self.device)
            return run

    def _captured(self, run: Provider, current: torch.cuda.Stream) -> Provider:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is compiled, tuned and allocated once happens here
                run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, run: Provider) -> float:
        self._flush.zero_()
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


Timer = CpuTimer | CudaTimer


def timer_for(device: torch.device | str, *, graphs: bool = False) -> Timer:
    device = torch.device(device)
    return CudaTimer(device, graphs=graphs) if device.type == "cuda" else CpuTimer()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda".  Raises: ValueError (another name, or cuda without a GPU)."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"bench: device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device cuda needs a GPU that torch sees, got none")
    return default_device() if name == "auto" else torch.device(name)

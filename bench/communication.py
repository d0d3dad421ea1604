"""
Bytes that a device sends in a step, and memory that it holds, as a function of the ranks: arithmetic from shapes, nothing is run.

    python bench/communication.py [--json]

n processes, all linear projections adapted, the base frozen. In the mean over the processes each sends in a step
    DDP      2 (n−1)/n · G                      one all-reduce of the factors' gradients
    FSDP2    the same + (n−1)/n · (2 P + E)     the frozen base gathered: its blocks P for forward and again for backward, the rest E once
    HSDP     the same + (8−1)/8 · (2 P + E)     FSDP2 that shards within a node of 8: nothing but the factors' gradients leaves it
with G = itemsize · (2 + Σ over modules of r (K + N) + 2): marks that say which gradients are there, and which step it is. A ring sends
this, and so does a tree. Times are estimates from data-sheet bandwidths and NCCL's own latencies: no network has been timed for them.
"""

import argparse
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "communication.json"
DEVICES = (8, 64, 256, 1024)
ENGINES = ("DDP", "FSDP2", "HSDP")
NODE = 8
Shapes = Mapping[str, tuple[int, int]]  # {module: (K, N)}
Ranks = float | Mapping[str, int]  # of every module, or of each


@dataclass(frozen=True)
class Decoder:
    """A decoder of LLaMA's build: its dimensions, and what follows from them."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int  # width of keys and values
    vocabulary: int

    def block(self) -> dict[str, tuple[int, int]]:
        hidden, inner, kv = self.hidden, self.intermediate, self.kv
        attention = {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (hidden, hidden),
        }
        mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()}

    def linears(self) -> dict[str, tuple[int, int]]:
        """(K, N) of every adapted projection."""
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in self.block().items()}

    def block_parameters(self) -> int:
        """Numbers in one block: its projections and two norms."""
        return sum(K * N for K, N in self.block().values()) + 2 * self.hidden

    def other_parameters(self) -> int:
        """Embeddings, output layer, last norm."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    def parameters(self) -> int:
        return self.layers * self.block_parameters() + self.other_parameters()


DECODERS = (
    Decoder("LLaMA-2 7B", 32, 4096, 11008, 4096, 32000),
    Decoder("LLaMA-3 8B", 32, 4096, 14336, 1024, 128256),
    Decoder("LLaMA-2 70B", 80, 8192, 28672, 1024, 32000),
    Decoder("LLaMA-3 70B", 80, 8192, 28672, 1024, 128256),
)


def factor_numbers(shapes: Shapes, ranks: Ranks) -> float:
    """Σ r (K + N): the numbers of lora_A (r, K) and lora_B (N, r) of all modules."""
    return sum((ranks[m] if isinstance(ranks, Mapping) else ranks) * (K + N) for m, (K, N) in shapes.items())


def gradient_bytes(shapes: Shapes, ranks: Ranks, itemsize: int = 4) -> float:
    """Bytes of the one buffer: all gradients of the factors, a mark for each factor that has rank vectors, and the two of the step."""
    marks = 2 * sum((ranks[m] if isinstance(ranks, Mapping) else ranks) > 0 for m in shapes)
    return itemsize * (factor_numbers(shapes, ranks) + marks + 2)


def all_reduce(nbytes: float, n: int) -> float:
    """Bytes that a process sends in an all-reduce: each of n parts goes n−1 steps to be added up, and n−1 to be known everywhere."""
    return 2 * (n - 1) / n * nbytes


def all_gather(nbytes: float, n: int) -> float:
    """Bytes that a process sends so that all have `nbytes`, of which each had 1/n."""
    return (n - 1) / n * nbytes


# Ranks that change


def decision_bytes(ranks: Mapping[str, int] | None, state: dict) -> int:
    """
    Bytes of what the deciding process tells each other one when ranks may change, pickled: the new ranks, None if they stay, and the
    method's state. Besides there are 8 for its length, and 3 numbers of 8 bytes that are compared.
    """
    return len(pickle.dumps((None if ranks is None else dict(ranks), state, None)))


# A step


@dataclass(frozen=True)
class Trained:
    """What trains: ranks that are active now, the ranks that memory is held for, or (full) every weight."""

    name: str
    ranks: Ranks = 0
    held: Ranks | None = None  # None: as many as are active
    full: bool = False


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number."""

    base: int = 2  # bfloat16
    factor: int = 4  # float32, and so are their gradients
    moments: int = 8  # AdamW's two, float32


def shards_of(engine: str, n: int) -> int:
    """In how many parts the base lies on n devices."""
    return {"DDP": 1, "FSDP2": n, "HSDP": min(n, NODE)}[engine]


def sent(decoder: Decoder, trained: Trained, n: int, engine: str, sizes: Sizes = Sizes()) -> dict[str, float]:
    """
    Bytes that a device sends in a step: `base` (weights gathered) and `gradients`.

    Training all weights averages bfloat16 gradients: all-reduced by DDP; reduce-scattered among the shards, half as many bytes, by FSDP2,
    and each shard all-reduced between nodes by HSDP.
    """
    shards = shards_of(engine, n)
    gathered = sizes.base * (2 * decoder.layers * decoder.block_parameters() + decoder.other_parameters())
    if trained.full:
        weights = sizes.base * decoder.parameters()
        gradients = all_gather(weights, shards) + all_reduce(weights / shards, n // shards)
    else:
        gradients = all_reduce(gradient_bytes(decoder.linears(), trained.ranks, sizes.factor), n)
    return {"base": all_gather(gathered, shards), "gradients": gradients}


def memory(decoder: Decoder, trained: Trained, n: int, engine: str, sizes: Sizes = Sizes()) -> dict[str, float]:
    """
    Bytes that a device holds, activations left out.

    base: the weights, or a shard of them.   gathered: sharded weights in use at once: one block, the next on its way, and embeddings
    and output layer, which stay from forward to backward.   factors, optimizer: of `held` ranks.   gradients, and the buffer that they
    travel in: of the active ones. Full fine-tuning has no buffer beside its gradients (gradient_as_bucket_view).
    """
    shards = shards_of(engine, n)
    in_use = sizes.base * (2 * decoder.block_parameters() + decoder.other_parameters())
    parts = {"base": sizes.base * decoder.parameters() / shards, "gathered": in_use if shards > 1 else 0}
    if trained.full:
        numbers = decoder.parameters() / shards
        trains = {"gradients": sizes.base * numbers, "optimizer": sizes.moments * numbers}
        return parts | {"factors": 0, "buffer": 0} | trains
    shapes = decoder.linears()
    held = factor_numbers(shapes, trained.ranks if trained.held is None else trained.held)
    return parts | {
        "factors": sizes.factor * held,
        "gradients": sizes.factor * factor_numbers(shapes, trained.ranks),
        "buffer": gradient_bytes(shapes, trained.ranks, sizes.factor),
        "optimizer": sizes.moments * held,
    }


# Estimates of time


@dataclass(frozen=True)
class Network:
    """
    Nodes of 8 H100. Bandwidths in bytes a second and device, one direction, of data sheets: NVLink 900 GB/s both ways, ConnectX-7
    400 Gb/s for each GPU of a DGX H100. Latencies in seconds a step: NCCL's tuner, protocol Simple (src/graph/tuning.cc).
    """

    per_node: int = NODE
    inside: float = 450e9
    between: float = 50e9
    start: float = 8.4e-6
    ring_inside: float = 3.4e-6
    tree_inside: float = 4.0e-6
    step_between: float = 14e-6
    flops: float = 0.4 * 989e12  # bfloat16 products at 40 % of the data sheet's

    def all_reduce_seconds(self, nbytes: float, n: int) -> float:
        """The faster of ring and tree, as NCCL's tuner counts their steps."""
        nodes = math.ceil(n / self.per_node)
        moving = all_reduce(nbytes, n) / self._bandwidth(nodes)
        ring = self._ring_steps(n, nodes) * 2
        tree = 2 * ((n / nodes - 1) * self.tree_inside + math.floor(math.log2(nodes)) * self.step_between)
        return self.start + moving + min(ring, tree)

    def all_gather_seconds(self, nbytes: float, n: int) -> float:
        nodes = math.ceil(n / self.per_node)
        return self.start + all_gather(nbytes, n) / self._bandwidth(nodes) + self._ring_steps(n, nodes)

    def _bandwidth(self, nodes: int) -> float:
        return self.inside if nodes == 1 else self.between

    def _ring_steps(self, n: int, nodes: int) -> float:
        return (n - nodes) * self.ring_inside + (nodes - 1) * self.step_between


def step_seconds(
    decoder: Decoder, trained: Trained, n: int, engine: str, network: Network, tokens: int
) -> dict[str, float]:
    """
    Estimates for a step of `tokens` tokens on each device, adapters only.

    compute: 4 · parameters · tokens FLOPs, forward and dx.   gathering: of sharded weights, a collective for each block and direction,
    beside the compute.   gradients: the factors' all-reduce, which begins when the last gradient is there.   exposed: what the step
    waits for: the gradients, and of the gathering what is longer than the compute.
    """
    sizes = Sizes()
    compute = 4 * decoder.parameters() * tokens / network.flops
    gathering, shards = 0.0, shards_of(engine, n)
    if shards > 1:
        gathering = 2 * decoder.layers * network.all_gather_seconds(sizes.base * decoder.block_parameters(), shards)
        gathering += network.all_gather_seconds(sizes.base * decoder.other_parameters(), shards)
    gradients = network.all_reduce_seconds(gradient_bytes(decoder.linears(), trained.ranks, sizes.factor), n)
    exposed = gradients + max(0.0, gathering - compute)
    return {"compute": compute, "gathering": gathering, "gradients": gradients, "exposed": exposed}


# Tables

R = 8
# NormAL's preset halves the ranks; La-LoRA's 2.55 is the mean over `adaptlora finetune --preset trec --method lalora --temperature 10`.
TRAINED = (
    Trained("LoRA, or any masked method, r = 8", R),
    Trained("NormAL, r = 8, clipped to 4", R / 2),
    Trained("La-LoRA, r ≤ 8, mean 2.55", 2.55, held=R),
    Trained("all weights", full=True),
)
TOKENS = 4096


def rows() -> list[dict]:
    found = []
    for decoder in (DECODERS[0], DECODERS[3]):
        for engine in ENGINES:
            for trained in TRAINED:
                for n in DEVICES:
                    row = {"model": decoder.name, "engine": engine, "trained": trained.name, "devices": n}
                    row["sent"] = {k: round(v) for k, v in sent(decoder, trained, n, engine).items()}
                    row["memory"] = {k: round(v) for k, v in memory(decoder, trained, n, engine).items()}
                    if not trained.full:
                        seconds = step_seconds(decoder, trained, n, engine, Network(), TOKENS)
                        row["estimated_ms"] = {k: round(1e3 * v, 3) for k, v in seconds.items()}
                    found.append(row)
    return found


def table(found: list[dict], title: str, value) -> Table:
    """`value(row)` by number of devices."""
    shown = Table(title=title, title_justify="left")
    for column in ("model", "engine", "trained", *map(str, DEVICES)):
        shown.add_column(column, justify="right" if column.isdigit() else "left")
    cells: dict[tuple, list[str]] = {}
    for row in found:
        cells.setdefault((row["model"], row["engine"], row["trained"]), []).append(value(row))
    for heads, values in cells.items():
        shown.add_row(*heads, *values)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.relative_to(RESULTS.parents[2])}")
    options = parser.parse_args()
    found = rows()
    console = Console(width=160)

    def megabytes(row):
        return f"{sum(row['sent'].values()) / 1e6:,.1f}"

    def gigabytes(row):
        return f"{sum(row['memory'].values()) / 1e9:,.2f}"

    def estimate(row):
        ms = row.get("estimated_ms")
        return f"{ms['gradients']:.2f} / {ms['exposed']:.2f} / {ms['compute']:.0f}" if ms else ""

    console.print(table(found, "MB sent by each device in a step", megabytes))
    console.print(table(found, "GB held by each device, without activations", gigabytes))
    console.print(table(found, "estimated ms: the factors' all-reduce / exposed in all / compute", estimate))
    if options.json:
        assumed = {"sizes": asdict(Sizes()), "network": asdict(Network()), "tokens": TOKENS}
        RESULTS.write_text(json.dumps({"assumed": assumed, "rows": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

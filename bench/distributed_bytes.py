"""Bytes that steps and rank changes of several processes send, counted by a communication hook and on the wire, beside the model's."""

import torch.distributed as dist
from communication import decision_bytes, gradient_bytes
from distributed_providers import FLOOR, LINEARS, MINILM, Case, Trained, batch, encoder
from gloo_wire import HEADER, wire_all_gather, wire_all_reduce, wire_broadcast
from loopback import Counter
from torch.distributed.fsdp import fully_shard

import adaptlora

# How near the model must be. It counts one acknowledgement a message, where the kernel sends none to three: little beside gradients, but
# a seventh of the 352 bytes that a message of no length costs.
WIRE_TOLERANCE = {"wire": 0.05, "told wire": HEADER / wire_broadcast(0, 2)}


def shapes(adapter) -> dict[str, tuple[int, int]]:
    return {name: (layer.in_features, layer.out_features) for name, layer in adapter.layers.items()}


def traffic(case: Case, barrier, steps: int) -> list[dict]:
    """Bytes of a step, by ours and by DDP's reducer, beside the model's."""
    rows = []
    for name in (FLOOR, "adaptlora"):
        counter = Counter(barrier)
        trained = Trained(case, name, hook=counter.hook())
        trained.gradients(), trained.gradients()  # DDP makes its buckets anew after the first
        counted = counter.of(lambda trained=trained: [trained.gradients() for _ in range(steps)])
        row = {"case": case.name, "modules": case.modules, "r": case.r, "provider": name}
        row |= {key: value / steps for key, value in counted.items()}
        if name == "adaptlora":
            rows.append(row | modelled(trained.adapter))
        else:
            rows.append(row)
    return rows


def modelled(adapter) -> dict[str, float]:
    """What the model says of a step with the ranks of now."""
    payload = gradient_bytes(shapes(adapter), adapter.ranks()) if dist.get_world_size() > 1 else 0
    return {"modelled": payload, "wire modelled": wire_all_reduce(payload, 4, dist.get_world_size())}


def told(adapter, change) -> dict[str, float]:
    """What processes tell each other when ranks may change: its length, the decision, and three numbers that are compared."""
    decision = decision_bytes(None if change is None else change.after, adapter.method.step_state())
    n = dist.get_world_size()
    wire = wire_broadcast(8, n) + wire_broadcast(decision, n) + wire_all_reduce(3 * 8, 8, n)
    return {"told": 8 + decision + 3 * 8, "told wire modelled": wire}


def live(config, barrier, steps: int) -> list[dict]:
    """A run whose ranks change: the bytes of every step's gradients, and of every rank change."""
    counter = Counter(barrier)
    trained = Trained(MINILM[3], "adaptlora", config, counter.hook())
    adapter, rows = trained.adapter, []
    for step in range(steps):
        row = {"step": step, "average rank": sum(adapter.ranks().values()) / len(adapter.ranks())}

        def gradients():
            (trained.loss() + adapter.penalty()).backward()
            trained.optimizer.step()

        row |= counter.of(gradients) | modelled(adapter)
        decides = adapter.method.may_change()
        changes = []
        row["told wire"] = counter.of(lambda changes=changes: changes.append(adapter.step()))["wire"]
        row |= told(adapter, changes[0]) if decides else {"told": 0, "told wire modelled": 0}
        trained.optimizer.zero_grad()
        rows.append(row)
    return rows


def sharded(barrier, steps: int) -> dict:
    """FSDP2 over MiniLM's sizes: the frozen base gathered, beside the model's bytes."""
    case = MINILM[3]
    model = encoder(case).train()
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=case.r, target_modules=LINEARS))
    ignored = set(adapter.factors())
    sizes = [sum(p.numel() for p in block.parameters() if p not in ignored) for block in model.bert.encoder.layer]
    rest = sum(p.numel() for p in model.parameters() if p not in ignored) - sum(sizes)
    for block in model.bert.encoder.layer:
        fully_shard(block, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)
    counter = Counter(barrier)
    adapter.distribute(model, comm_hook=counter.hook())
    inputs = batch()

    def step():
        model.zero_grad()
        model(**inputs).loss.backward()

    step()
    counted = counter.of(lambda: [step() for _ in range(steps)])
    n = dist.get_world_size()
    predicted = modelled(adapter)
    base = sum(2 * wire_all_gather(4 * size, n) for size in sizes) + wire_all_gather(4 * rest, n)
    row = {key: value / steps for key, value in counted.items()} | predicted
    return row | {"wire modelled": predicted["wire modelled"] + base, "base modelled": base}


def check(results: dict, isolated: bool) -> None:
    """The model is exact for what is handed to the all-reduce, and near what the network's counters say."""
    rows = (*results["traffic"], *results["NormAL"], *results["La-LoRA"], *results["FSDP2"])
    for row in rows:
        if "modelled" in row:
            assert row["hook"] == row["modelled"], f"the hook saw {row['hook']} bytes, not {row['modelled']}: {row}"
        for key, tolerance in WIRE_TOLERANCE.items():
            predicted = row.get(f"{key} modelled")
            if isolated and predicted is not None:
                error = abs(row[key] - predicted)
                assert error <= tolerance * predicted, f"{key}: {row[key]} bytes, and {predicted} were predicted: {row}"

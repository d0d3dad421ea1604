"""What goes into an adapter and comes out of it: files, other factors, everything that its training depends on."""

import math

import torch

from . import io, merged_model, nora_files, serving_files
from .distributed.sharding import is_sharded
from .nn import Outer
from .save_options import check_options

# Of `Adapter.state_dict`.
_FIELDS = {
    "factors",
    "statistics",
    "parked",
    "outer",
    "starts",
    "biases",
    "scalings",
    "groups",
    "modules_to_save",
    "method",
}


def _like(weighting: torch.Tensor | None, layer) -> torch.Tensor | None:
    return None if weighting is None else weighting.to(layer.outer_S)


def _outer_state(layer) -> dict:
    return layer.outer._asdict() | {"weighting": layer.weighting, "residual": layer.residual}


def _check_outer_state(layer, state: dict) -> None:
    """Raises: ValueError if a nested layer's frozen factors, or what was taken out of its base, cannot be those of `state`."""
    layer.check_outer(Outer(*(state[field] for field in Outer._fields)))
    if state["residual"] != layer.residual:
        raise ValueError(
            f"what was taken out of the base must be of (rank, scaling) {layer.residual}, got {state['residual']}"
        )


def _of_rewritten_bases(stored, layers: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    The file's factors without the vectors, at their end, that put back what is taken out of base weights: a file is for the base as
    it was.  Raises: ValueError (other vectors than the adapter's, or none).
    """
    factors = dict(stored.factors)
    for name, layer in layers.items():
        if layer.residual is None:
            continue
        count = layer.residual[0]
        lora_A, lora_B = stored.factors.get(name, (layer.lora_A[:0], layer.lora_B[:, :0]))
        taken = layer.residual_factors(stored.scalings.get(name))
        own = lora_A.shape[0] >= count and torch.equal(lora_A[-count:], taken[0].to(lora_A))
        if not own or not torch.allclose(lora_B[:, -count:], -taken[1].to(lora_B), rtol=1e-6, atol=0):
            raise ValueError(
                f"load: {stored.path}: {name} must end in the {count} vectors that were taken out of its base, as this adapter saves "
                "them with fold_residual=True, got others (adaptlora.load(model, path) takes any file on the base as it was)"
            )
        factors[name] = lora_A[:-count], lora_B[:, :-count]
    return factors


class AdapterContents:
    """The part of `Adapter` that reads and replaces what it holds."""

    def save(
        self,
        path,
        *,
        format: str = "peft",
        fold_residual: bool = True,
        save_outer: bool = False,
        pad: bool | int = False,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """
        Write the adapter to the folder `path`, its files as one: whatever happens, adaptlora finds the old adapter or this one there. Stock
        PEFT can meet the new weights with the old configuration after a kill between the two renames, until adaptlora next looks or
        saves. Files that are no adapter's are left alone.

        Args:
            format: "peft": `PeftModel.from_pretrained(base, path)` computes what this model computes; modules of rank 0 are left out,
                and ranks that change in many steps lie beside it in rank_history.json. "nora": NoRA's inner factors, for `adaptlora.load`.
                "vllm": computes the same as "peft", with the scaling in lora_B, so that a server which takes one r and one lora_alpha for
                all modules computes it too (`serving_files`). "merged": the whole model with the updates in its weights, rounded once
                as `merge` does, in safetensors that its library's from_pretrained loads without adaptlora; the model here stays as it is,
                but the merged weights need memory for as long as it takes. `path` must not exist or be empty. Tokenizers are not written.
            fold_residual: of "peft", "vllm" and a method with a residual: True adds what was taken out of the base as r more rank vectors,
                for the base as it was; False leaves rank r, for the base that `base_state_dict` gives.
            pad: of "vllm": True fills every module up to the largest rank with zeros, an integer up to that rank (servers are set up for
                8, 16, 32, …); False leaves each its own rank.
            max_shard_size: of "merged": bytes in a file at most, or text as "5GB".
            save_outer: of "nora": store the outer factors; without them they are made again from the base weights, which must be the same.
        Raises: ValueError (every rank is 0, another format, an option of another one, NoRA's for another method, modules_to_save that FSDP
            shards; NonFiniteError: NaN or infinite weights, which are not written over a good adapter; "vllm": modules_to_save, pad;
            "merged": a base that is quantised or sharded, a weight tied to another, a folder that holds something), OSError (disk full,
            no such right, TimeoutError where another process writes to the folder for long): the path is named.
        """
        for name, module in self.saved.items():
            if any(is_sharded(tensor) for tensor in module.state_dict().values()):
                raise ValueError(
                    f"save: modules_to_save must be whole in every process, and FSDP shards {name} (fully_shard with "
                    "ignored_params={*adapter.factors(), *adapter.parameters()} leaves them out)"
                )
        check_options(
            format, fold_residual=fold_residual, save_outer=save_outer, pad=pad, max_shard_size=max_shard_size
        )
        if format == "peft":
            io.write(self, path, fold_residual=fold_residual)
        elif format == "vllm":
            serving_files.write(self, path, pad=pad, fold_residual=fold_residual)
        elif format == "merged":
            merged_model.write(self, path, originals=self._originals, max_shard_size=max_shard_size)
        elif format == "nora" and self.method.nested:
            nora_files.write(self, path, save_outer=save_outer)
        else:
            rule = '"peft", "nora", "vllm" or "merged"' if self.method.nested else '"peft", "vllm" or "merged"'
            raise ValueError(f"save: format must be {rule} for {type(self.config).__name__}, got {format!r}")

    def load(self, path) -> None:
        """
        Take ranks, scalings and weights from a PEFT adapter folder, where a module that the file lacks gets rank 0; or the inner factors
        from a NoRA folder, whose outer factors must be those of this adapter. Where vectors were taken out of the base (PiSSA, MiLoRA) the
        file must hold them, as it does if it was saved with fold_residual=True; they stay taken out.

        Raises: FileNotFoundError, ValueError (damaged, unsupported, or does not fit); nothing has changed then.
        """
        self.check_trainable("load")
        self._fill(io.read(path))

    def _fill(self, stored) -> None:
        io.check_fits(stored, self)
        if self.method.nested:
            for name, outer in stored.outer.outers.items():
                self.layers[name].take_outer(outer)
            for name, layer in self.layers.items():
                layer.weighting = _like(stored.outer.weightings.get(name), layer)
            factors = stored.factors
        else:
            factors = _of_rewritten_bases(stored, self.layers)
        self._take(factors, stored.scalings)
        self._take_biases({} if self.method.nested else stored.biases)
        for name, tensors in stored.saved.items():
            self.saved[name].load_state_dict(tensors)

    @torch.no_grad()
    def _take_biases(self, biases: dict[str, torch.Tensor]) -> None:
        """lora_bias of every module that has one; zero where none is given."""
        for name, layer in self.layers.items():
            if layer.lora_bias is not None:
                layer.lora_bias.copy_(biases.get(name, 0.0))

    def base_state_dict(self) -> dict[str, torch.Tensor]:
        """The plain model's tensors by its own names: base weights, less what was taken out of them, and modules trained whole."""
        own = {f"{name}.{key}" for name, layer in self.layers.items() for key in layer.state_dict()}
        tensors = {key: tensor for key, tensor in self.model.state_dict().items() if key not in own}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in layer.base_layer.state_dict().items()}
        return tensors

    def _take(self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], scalings: dict[str, float]) -> None:
        """Checked ranks, weights and scalings from outside; a module without any gets rank 0."""
        ranks = {name: factors[name][0].shape[0] if name in factors else 0 for name in self.layers}
        self.method.check_ranks(ranks)
        self._commit(ranks, compact=True)
        if self.method.parks:
            # Room to grow into, as there was at first: vectors are drawn, and parked.
            self._commit(self.method.largest_ranks(), compact=False)
            self._commit(ranks, compact=False)
        with torch.no_grad():
            for name, (lora_A, lora_B) in factors.items():
                self.layers[name].set_factors(lora_A, lora_B)
                self.layers[name].scaling = scalings[name]
        self.method.start_from(ranks)

    def replace_factors(
        self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], scalings: dict[str, float]
    ) -> None:
        """
        Other factors for the same modules: ranks follow, a module without any gets rank 0, and tracked optimizers forget the
        state of all factors, whose vectors are others now.

        Args: factors: {module name: (lora_A (R, K), lora_B (N, R))}, any rank, any floating dtype.   scalings: {module name: number}.
        Raises: ValueError (an unknown module, a shape, ranks that the method refuses); nothing has changed then.
        """
        self.check_trainable("replace_factors")
        if self.method.nested:
            raise ValueError(
                "replace_factors: the adapter must hold plain pairs, got NoRA's nested ones (save it for PEFT and load that)"
            )
        for name, (lora_A, lora_B) in factors.items():
            if name not in self.layers:
                raise ValueError(f"replace_factors: factors must name adapted modules, got {name!r}")
            io.check_pair("replace_factors", name, lora_A, lora_B, self.layers[name])
            scaling = scalings.get(name)
            if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
                raise ValueError(f"replace_factors: scalings must give {name} a finite number, got {scaling!r}")
        self._take(factors, scalings)
        for layer in self.layers.values():
            for optimizer in layer.pair.optimizers:
                for factor in layer.pair.factor_names:
                    optimizer.state.pop(getattr(layer.pair, factor), None)

    def state_dict(self) -> dict:
        """
        Factors, parked vectors, what a method keeps of each element, what was taken out of base weights, scalings, modules_to_save and
        the method's own state; which projections were found to share their input; tensors are the live ones but for the parked.
        """
        return {
            "factors": {name: layer.pair.factors() for name, layer in self.layers.items()},
            "statistics": {name: layer.pair.statistics() for name, layer in self.layers.items()},
            "parked": {name: layer.pair.parked() for name, layer in self.layers.items()},
            "outer": {name: _outer_state(layer) for name, layer in self.layers.items()} if self.method.nested else {},
            "starts": {name: layer.start_state() for name, layer in self.layers.items()},
            "biases": {name: layer.lora_bias for name, layer in self.layers.items() if layer.lora_bias is not None},
            "scalings": {name: layer.scaling for name, layer in self.layers.items()},
            "groups": self._groups.state(),
            "modules_to_save": {name: module.state_dict() for name, module in self.saved.items()},
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Inverse of `state_dict`; ranks follow the state. The state of parked vectors goes to the tracked optimizers, or to the next one that
        is tracked.

        Raises: ValueError (other modules or shapes, another start, a field that is missing or unknown); nothing has changed then. Where
            there are no statistics or starts, as in states from before there were such, every module has none.
        """
        state = (
            {field: {name: {} for name in self.layers} for field in ("statistics", "starts")}
            | {"biases": {}, "groups": {}}
            | state
        )
        if state.keys() != _FIELDS:
            different = sorted(state.keys() ^ _FIELDS)
            raise ValueError(
                f"load_state_dict: state must hold {', '.join(sorted(_FIELDS))}, got a difference in {different}"
            )
        factors = state["factors"]
        if factors.keys() != self.layers.keys():
            different = sorted(factors.keys() ^ self.layers.keys())
            raise ValueError(
                f"load_state_dict: factors must name the adapter's modules, got a difference in {different[:5]}"
            )
        for name, pair in factors.items():
            io.check_factors("load_state_dict", name, pair, self.layers[name])
        io.check_saved("load_state_dict", state["modules_to_save"], self.saved)
        expected_fields = {
            "scalings": self.layers,
            "parked": self.layers,
            "statistics": self.layers,
            "starts": self.layers,
            "biases": self.state_dict()["biases"],
            "outer": self.layers if self.method.nested else {},
            "method": self.method.state_dict(),
        }
        for field, expected in expected_fields.items():
            if state[field].keys() != expected.keys():
                different = sorted(state[field].keys() ^ expected.keys())
                raise ValueError(
                    f"load_state_dict: {field} must have the adapter's entries, got a difference in {different[:5]}"
                )
        try:
            self._groups.check_state(state["groups"])
        except ValueError as error:
            raise ValueError(f"load_state_dict: {error}") from error
        for name, bias in state["biases"].items():
            io.check_bias("load_state_dict", name, bias, self.layers[name])
        for name, layer in self.layers.items():
            scaling = state["scalings"][name]
            if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
                raise ValueError(f"load_state_dict: scalings must give {name} a finite number, got {scaling!r}")
            try:
                layer.pair.check_parked(state["parked"][name])
                layer.pair.check_statistics(state["statistics"][name], factors[name]["lora_A"].shape[0])
                layer.check_start(state["starts"][name])
                if self.method.nested:
                    _check_outer_state(layer, state["outer"][name])
            except ValueError as error:
                raise ValueError(f"load_state_dict: {name}: {error}") from error
        try:
            self.method.check_state(state["method"])
        except ValueError as error:
            raise ValueError(f"load_state_dict: {error}") from error
        self._commit({name: pair["lora_A"].shape[0] for name, pair in factors.items()}, compact=True)
        for name, outer in state["outer"].items():
            self.layers[name].take_outer(Outer(*(outer[field] for field in Outer._fields)))
            self.layers[name].weighting = _like(outer["weighting"], self.layers[name])
        for name, start in state["starts"].items():
            self.layers[name].take_start(start)
        self._take_biases(state["biases"])
        with torch.no_grad():
            for name, pair in factors.items():
                for factor, values in pair.items():
                    getattr(self.layers[name].pair, factor).copy_(values)
                self.layers[name].pair.park(state["parked"][name])
                self.layers[name].pair.take_statistics(state["statistics"][name])
                self.layers[name].scaling = state["scalings"][name]
        for name, tensors in state["modules_to_save"].items():
            self.saved[name].load_state_dict(tensors)
        self.method.load_state_dict(state["method"])
        self._groups.take_state(state["groups"])

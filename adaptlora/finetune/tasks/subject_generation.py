"""A subject learnt from a few images of it by Stable Diffusion XL: the noise in its latents, predicted by the adapted UNet.

The text encoders and the VAE are frozen, and there is one sentence: their outputs are computed once, and they are let go.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ...lora_files.diffusers import write_component
from .. import pictures, tiny_clip
from .._extras import need
from ..presets import HUB
from .base import model_source
from .images import ImageOptions, ImageTask

_TEST_SEED = 0  # of the noise that is tested on: the same for runs of every seed


@dataclass(frozen=True)
class SubjectGenerationOptions(ImageOptions):
    """
    Args:
        prompt: the sentence of all images, with a rare word for the subject.
        resolution: side of the square that is cut out of the middle of each image, in pixels.
        vae: a VAE to use instead of the pipeline's own, "hub:owner/name" or a folder.
        test_draws: timesteps, evenly spread, at which each held-out image is tested.
    """

    prompt: str = "a photo of sks subject"
    resolution: int = 1024
    vae: str | None = None
    test_draws: int = 10

    def __post_init__(self):
        super().__post_init__()
        self.rule("prompt", isinstance(self.prompt, str) and self.prompt.strip() != "", "a text")
        self.rule("resolution", self.resolution >= 8 and self.resolution % 8 == 0, "a multiple of 8")
        self.rule("test_draws", self.test_draws >= 1, "at least 1")


class SubjectGeneration(ImageTask):
    """Mean squared error of the predicted noise (or velocity, where the pipeline's scheduler says so)."""

    roles: ClassVar = {"image": "image"}
    metrics: ClassVar = {"noise_loss": False}
    packages: ClassVar = (*ImageTask.packages, "diffusers")
    architecture_keys: ClassVar = ("parts",)
    Options = SubjectGenerationOptions
    _tiny_options: ClassVar = {**ImageTask._tiny_options, "resolution": 64, "vae": None, "test_draws": 2}

    def _prepare(self) -> None:
        self.scheduler = self._part("DDPMScheduler", "scheduler")
        self._text = self._encoded_prompt()

    @torch.no_grad()
    def _encoded_prompt(self) -> tuple[Tensor, Tensor]:
        """(states (1, tokens, both encoders' widths), pooled (1, width)) of the prompt."""
        states, pooled = [], None
        for end, kind in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection")):
            tokenizer = self._part("CLIPTokenizer", f"tokenizer{end}")
            encoder = self._part(kind, f"text_encoder{end}", dtype=torch.float32).to(self.device).eval()
            ids = tokenizer(
                self.options.prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )["input_ids"]
            found = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(found.hidden_states[-2])  # SDXL was trained with the last layer but one
            pooled = found[0]
        return torch.cat(states, dim=-1).to(self._dtype), pooled.to(self._dtype)

    @torch.no_grad()
    def _encode(self, rows) -> list[dict]:
        vae = self._vae().to(self.device).eval()
        factor, side = vae.config.scaling_factor, self.options.resolution
        encoded = []
        for row in range(len(rows)):
            pixels, time_ids = _centre(pictures.picture(rows, row), side)
            latents = vae.encode(pixels[None].to(self.device)).latent_dist
            encoded.append(
                {"mean": latents.mean[0] * factor, "std": latents.std[0] * factor, "time_ids": time_ids.to(self.device)}
            )
        return encoded

    def _vae(self) -> nn.Module:
        """In float32: SDXL's own overflows in float16."""
        if self.options.vae is None:
            return self._part("AutoencoderKL", "vae", torch_dtype=torch.float32)
        return self._load("AutoencoderKL", self.options.vae.removeprefix(HUB), torch_dtype=torch.float32)

    def model(self) -> nn.Module:
        model = self._part("UNet2DConditionModel", "unet", torch_dtype=self._dtype)
        if self.spec.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model.to(self.device)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.dtype)

    def _part(self, kind: str, subfolder: str, **arguments):
        source = model_source(self.spec)
        if self.spec.revision is not None:
            arguments["revision"] = self.spec.revision
        return self._load(kind, source, subfolder=subfolder, **arguments)

    def _load(self, kind: str, source, **arguments):
        """`kind`.from_pretrained, of transformers or diffusers. Raises: ValueError."""
        home = self.transformers if hasattr(self.transformers, kind) else need("diffusers", "adaptlora finetune")
        try:
            # diffusers puts what it is given into files, as text
            return getattr(home, kind).from_pretrained(str(source), local_files_only=Path(source).is_dir(), **arguments)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            what = f"{kind} from {arguments.get('subfolder', '.')}"
            raise ValueError(f"finetune: model must load {what}, got {str(source)!r}: {reason}") from error

    def batches(self) -> Iterator[dict[str, Tensor]]:
        size, last = self.spec.batch_size, self.scheduler.config.num_train_timesteps
        for step in range(self.spec.steps):
            generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + step)
            items = [self.train[row] for row in self._order[step * size : (step + 1) * size].tolist()]
            timesteps = torch.randint(last, (len(items),), generator=generator)
            yield self._collate(items, timesteps, generator)

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        draws, last = self.options.test_draws, self.scheduler.config.num_train_timesteps
        timesteps = (torch.arange(draws) * 2 + 1) * last // (2 * draws)
        for row, item in enumerate(self.test):
            for start in range(0, draws, self.spec.batch_size):
                part = timesteps[start : start + self.spec.batch_size]
                generator = torch.Generator().manual_seed(_TEST_SEED + row * draws + start)
                yield self._collate([item] * len(part), part, generator)

    def probe(self) -> dict[str, Tensor]:
        return next(self.test_batches())

    def _collate(self, rows: list[dict], timesteps: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Noised latents, timesteps and what is to be predicted; all that is drawn at random is in the batch."""
        mean = torch.stack([row["mean"] for row in rows])
        drawn = torch.randn(2, *mean.shape, generator=generator).to(self.device)
        latents = mean + torch.stack([row["std"] for row in rows]) * drawn[0]
        timesteps = timesteps.to(self.device)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, drawn[1], timesteps) if velocity else drawn[1]
        return {
            "sample": self.scheduler.add_noise(latents, drawn[1], timesteps).to(self._dtype),
            "timestep": timesteps,
            "time_ids": torch.stack([row["time_ids"] for row in rows]).to(self._dtype),
            "target": target,
        }

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What is predicted of the noise, (batch, channels, height, width)."""
        states, pooled = (text.expand(len(batch["sample"]), *text.shape[1:]) for text in self._text)
        return model(
            batch["sample"],
            batch["timestep"],
            encoder_hidden_states=states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": batch["time_ids"]},
        ).sample

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return mse_loss(self.output(model, batch).float(), batch["target"].float())

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        total = count = 0
        for batch in self.test_batches():
            total += self.loss(model, batch).double().item() * len(batch["sample"])
            count += len(batch["sample"])
        return {"noise_loss": total / count}

    def export(self, adapter: Path, out: Path) -> None:
        """For pipeline.load_lora_weights(out / "diffusers")."""
        (out / "diffusers").mkdir()
        write_component(adapter, "unet", out / "diffusers" / "pytorch_lora_weights.safetensors")

    @classmethod
    def meta_model(cls, architecture: Mapping) -> nn.Module:
        unet = need("diffusers", "adaptlora finetune --dry-run").UNet2DConditionModel
        with torch.device("meta"):
            return unet.from_config(architecture["config"])

    @classmethod
    def write_tiny(cls, architecture: Mapping, folder: Path, rows: list[dict], *, seed: int = 0) -> None:
        """A pipeline's folder; `parts` has the configurations of what stands around the UNet."""
        diffusers, transformers = (need(name, "adaptlora finetune --dry-run") for name in ("diffusers", "transformers"))
        parts = architecture["parts"]
        texts = [transformers.CLIPTextConfig(**parts[name]) for name in ("text_encoder", "text_encoder_2")]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline = diffusers.StableDiffusionXLPipeline(
                vae=diffusers.AutoencoderKL(**parts["vae"]),
                text_encoder=transformers.CLIPTextModel(texts[0]),
                text_encoder_2=transformers.CLIPTextModelWithProjection(texts[1]),
                tokenizer=tiny_clip.tokenizer(texts[0].max_position_embeddings),
                tokenizer_2=tiny_clip.tokenizer(texts[1].max_position_embeddings),
                unet=diffusers.UNet2DConditionModel.from_config({**architecture["config"], **architecture["tiny"]}),
                scheduler=diffusers.DDPMScheduler(**parts["scheduler"]),
                add_watermarker=False,
            )
        pipeline.save_pretrained(str(folder))


def _centre(image, side: int) -> tuple[Tensor, Tensor]:
    """(pixels (3, side, side) from −1 to 1, SDXL's time ids: size before, place of the cut, size after) of the middle of an image."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    cut = image.resize((width, height), resample=pictures.BILINEAR).crop((left, top, left + side, top + side))
    numpy = need("numpy", "adaptlora finetune")
    pixels = torch.from_numpy(numpy.array(cut)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, side, side])

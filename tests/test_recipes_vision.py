"""Tasks on images: real loading, processing, losses and scores on tiny models; COCO's average precision; what bad data are told."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("scipy")
Image = pytest.importorskip("PIL.Image")

from adaptlora.finetune import pictures, recipes, synthetic_images  # noqa: E402
from adaptlora.finetune.average_precision import Detections, Truth, average_precision  # noqa: E402
from adaptlora.finetune.dry_run import dry_run  # noqa: E402
from adaptlora.finetune.presets import FinetuneSpec  # noqa: E402
from adaptlora.finetune.registry import task_class  # noqa: E402
from adaptlora.finetune.runner import run  # noqa: E402
from adaptlora.finetune.tasks.clip_few_shot import few  # noqa: E402

RECIPES = {
    "image-classification": "cifar10-vit-base",
    "object-detection": "coco-yolos-tiny",
    "clip-few-shot": "food101-clip-16-shot",
    "subject-generation": "dreambooth-dog-sdxl",
}
NAMES = [*RECIPES.values(), "cifar100-vit-base", "food101-vit-base", "coco-yolos-small"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{task: folder of a tiny model}, written as the dry run does."""
    made = {}
    for task, name in RECIPES.items():
        made[task] = tmp_path_factory.mktemp("models") / task
        made[task].mkdir()
        task_class(task).write_tiny(recipes.read(recipes.find(name)).architecture, made[task], [])
    return made


def build(folders, task, data, **fields):
    """The task of a spec on local data, with everything that loading it checks."""
    spec = FinetuneSpec(model=str(folders[task]), data=str(data), task=task, data_dir=str(data.parent / "cache"))
    spec = replace(
        spec, **{"batch_size": 2, "steps": 4, "t_p": 1, "t_c": 2, "method": "lora", "device": "cpu"} | fields
    )
    kind = task_class(task)
    kind.check(spec)
    return kind(spec, kind.read(spec))


def picture(seed, size=(40, 30)):
    pixels = numpy.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def class_folder(root, classes=("cat", "hot_dog"), each=3):
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                picture(10 * number + i).save(root / split / name / f"{i}.png")
    return root


def box_folder(root, objects, split="train", **more):
    """An image of 40 × 30 for each of `objects`, {"bbox": …, "category": …}, and further columns."""
    (root / split).mkdir(parents=True)
    lines = []
    for i, found in enumerate(objects):
        picture(i).save(root / split / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "objects": found, **more}))
    (root / split / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name):
    recipe = recipes.read(recipes.find(name))
    found = dry_run(recipe)
    losses = found.report.losses["ours"]
    assert len(losses) == found.tiny.steps and all(loss > 0 for loss in losses)
    assert found.report.peft_difference < 1e-5
    assert set(found.report.scores["ours"]["end"]) == set(task_class(recipe.spec.task).metrics)
    # Published sizes: ViT-B/16 without its head, YOLOS 6.5 and 30.7 M, CLIP ViT-B/16, SDXL's UNet.
    published = {"vit": 85.8, "yolos-tiny": 6.5, "yolos-small": 30.7, "clip": 149.6, "sdxl": 2567.5}
    size = next(size for part, size in published.items() if part in name)
    assert round(found.real.base_parameters / 1e6, 1) == size


@pytest.mark.parametrize("method", ["lora", "lalora", "nora"])
def test_another_method_leaves_the_options_of_the_recipes_own(method):
    recipe = recipes.read(recipes.find("cifar10-vit-base"), {"method": method})
    assert recipe.spec.method == method and recipe.spec.options == {}
    kept = recipes.read(recipe.path, {"method": method, "options": {"use_rslora": True}})
    assert kept.spec.options == {"use_rslora": True}


# Average precision


def boxes(*rows):
    return numpy.array(rows, dtype=float).reshape(-1, 4)


def truth(rows, labels=None, crowd=None):
    count = len(rows)
    return Truth(boxes(*rows), numpy.array(labels or [1] * count), numpy.array(crowd or [False] * count, dtype=bool))


def detected(rows, scores, labels=None):
    return Detections(boxes(*rows), numpy.array(scores, dtype=float), numpy.array(labels or [1] * len(rows)))


A, B, AWAY = [0, 0, 10, 10], [20, 20, 40, 30], [60, 60, 70, 70]


@pytest.mark.parametrize(
    ("found", "there", "expected"),
    [
        # one box, found; with something wrong of lower score, which costs nothing, or of higher, which halves precision
        ([detected([A], [0.9])], [truth([A])], (1, 1, 1)),
        ([detected([A, AWAY], [0.9, 0.8])], [truth([A])], (1, 1, 1)),
        ([detected([A, AWAY], [0.8, 0.9])], [truth([A])], (0.5, 0.5, 0.5)),
        # one of two: precision 1 at the recalls 0, 0.01 … 0.50 of 101
        ([detected([A], [0.9])], [truth([A, B])], (51 / 101,) * 3),
        # an overlap of 0.62 is enough for the thresholds 0.50, 0.55 and 0.60 of ten
        ([detected([[0, 0, 10, 6.2]], [0.9])], [truth([A])], (0.3, 1, 0)),
        # a box is found once: the second detection of it is wrong, and stands before that of the other box
        ([detected([A, A, B], [0.9, 0.8, 0.7])], [truth([A, B])], ((51 + 50 * 2 / 3) / 101,) * 3),
        # what lies in a crowd counts neither way; the share of the box that does decides
        ([detected([A, [60, 60, 65, 65]], [0.8, 0.9])], [truth([A, [50, 50, 90, 90]], crowd=[False, True])], (1, 1, 1)),
        ([detected([[60, 60, 65, 65]], [0.9])], [truth([A, [50, 50, 90, 90]], crowd=[False, True])], (0, 0, 0)),
        # classes weigh the same; one that was only detected has no say
        ([detected([A, B, B], [0.9, 0.9, 0.9], [1, 3, 4])], [truth([A, B], [1, 2])], (0.5, 0.5, 0.5)),
        # ranked over all images: right 0.9, wrong 0.8, right 0.7
        (
            [detected([A, AWAY], [0.9, 0.8]), detected([A], [0.7])],
            [truth([A]), truth([A])],
            ((51 + 50 * 2 / 3) / 101,) * 3,
        ),
        ([detected([], []), detected([], [])], [truth([A]), truth([])], (0, 0, 0)),
    ],
)
def test_average_precision_by_hand(found, there, expected):
    assert list(average_precision(found, there).values()) == pytest.approx(expected, abs=1e-12)


def test_average_precision_takes_the_best_of_a_class_and_image():
    found = detected([AWAY] * 3 + [A], [0.9, 0.8, 0.7, 0.6])
    assert average_precision([found], [truth([A])])["map"] == pytest.approx(0.25)
    assert average_precision([found], [truth([A])], max_detections=3)["map"] == 0


def test_average_precision_refuses():
    with pytest.raises(ValueError, match="each of 2 images, got 1"):
        average_precision([detected([], [])], [truth([A]), truth([A])])
    with pytest.raises(ValueError, match="at least one box that is no crowd"):
        average_precision([detected([A], [1])], [truth([A], crowd=[True])])


def test_average_precision_is_that_of_cocos_own_code(capsys):
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    for seed in range(20):
        draw = numpy.random.default_rng(seed)
        found, there, annotations, results = [], [], [], []
        for image in range(1, 6):
            corner, size = draw.integers(0, 60, (7, 2)), draw.integers(5, 40, (7, 2))
            own = numpy.concatenate([corner, corner + size], axis=1).astype(float)
            labels, crowd = draw.integers(0, 3, 7), draw.random(7) < 0.15
            near = numpy.repeat(own, 2, axis=0) + draw.integers(-4, 5, (14, 4))
            near[:, 2:] = numpy.maximum(near[:, 2:], near[:, :2] + 1)
            guesses = Detections(near, draw.integers(0, 12, 14) / 12, numpy.repeat(labels, 2))  # many equal scores
            found.append(guesses)
            there.append(Truth(own, labels, crowd))
            for box, label, group in zip(own.tolist(), labels.tolist(), crowd.tolist(), strict=True):
                x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
                numbers = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "iscrowd": int(group)}
                annotations.append({**numbers, "bbox": [x, y, width, height], "area": width * height})
            for box, score, label in zip(near.tolist(), guesses.scores, guesses.labels, strict=True):
                place = {"image_id": image, "category_id": int(label), "score": float(score)}
                results.append({**place, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})
        official = coco()
        categories = [{"id": label} for label in range(3)]
        official.dataset = {
            "images": [{"id": image} for image in range(1, 6)],
            "annotations": annotations,
            "categories": categories,
        }
        official.createIndex()
        evaluated = evaluation(official, official.loadRes(results), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
        assert list(average_precision(found, there).values()) == pytest.approx(evaluated.stats[:3], abs=1e-12)


# Few shots


def test_few_shots_are_balanced_and_the_same_every_time():
    labels = torch.randint(3, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    chosen = few(labels, "abc", 4, seed=0)
    assert chosen == few(labels, "abc", 4, seed=0) == sorted(set(chosen))
    assert [sum(labels[row] == label for row in chosen) for label in range(3)] == [4, 4, 4]
    assert chosen != few(labels, "abc", 4, seed=1)
    with pytest.raises(ValueError, match=r"shots must be at most .* got 40 for \d+ of 'a'"):
        few(labels, "abc", 40, seed=0)


def test_few_shot_task_trains_on_the_chosen_images_of_the_train_part(folders, tmp_path):
    task = build(
        folders, "clip-few-shot", class_folder(tmp_path / "data"), test_split="test", task_options={"shots": 2}
    )
    assert len(task.train) == 4 and len(task.test) == 6
    assert [task.train[row]["labels"] for row in range(4)] == [0, 0, 1, 1]
    model = task.model()
    batch = next(task.batches())
    sentences = task._pretrained("AutoTokenizer")(
        ["a photo of a cat.", "a photo of a hot dog."], padding=True, return_tensors="pt"
    )
    expected = model(pixel_values=batch["pixel_values"], **sentences).logits_per_image
    torch.testing.assert_close(task.output(model, batch), expected)
    loss = torch.nn.functional.cross_entropy(expected, batch["labels"])
    torch.testing.assert_close(task.loss(model, batch), loss)
    found = torch.cat([task.output(model, batch) for batch in task.test_batches()])  # not more at once than in training
    assert found.shape == (6, 2)
    right = found.argmax(-1) == torch.tensor([0, 0, 0, 1, 1, 1])
    assert task.evaluate(model) == {"accuracy": right.double().mean().item()}


# Images from folders and files


def test_class_folder_and_jsonl_are_read_alike(folders, tmp_path):
    data = class_folder(tmp_path / "data")
    rows = [{"image": f"data/train/{name}/{i}.png", "label": name} for name in ("cat", "hot_dog") for i in range(3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    folder = build(folders, "image-classification", data, test_split="test")
    listed = build(folders, "image-classification", file, eval_data=str(file))
    processed = folder.processor(Image.open(data / "train" / "hot_dog" / "1.png"), return_tensors="pt")["pixel_values"][
        0
    ]
    assert folder.classes == listed.classes == ["cat", "hot_dog"] and len(folder.test) == len(listed.test) == 6
    for task in (folder, listed):
        assert task.train[4]["labels"] == 1
        assert torch.equal(task.train[4]["pixel_values"], processed)


def test_training_images_are_changed_at_random_and_alike_with_threads(folders, tmp_path):
    data = class_folder(tmp_path / "data")
    runs = [
        list(build(folders, "image-classification", data, test_split="test", task_options=options).batches())
        for options in ({}, {"workers": 3}, {"crop": 1, "flip": False}, {"crop": 1}, {"flip": False})
    ]
    same = [torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(runs[0], runs[1], strict=True)]
    assert same == [True] * 4
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(runs[0], runs[2], strict=True))
    plain = build(folders, "image-classification", data, test_split="test")
    still = torch.stack([plain.train[row]["pixel_values"] for row in plain._order[:2].tolist()])
    assert torch.equal(runs[2][0]["pixel_values"], still)
    pixels = [torch.cat([batch["pixel_values"] for batch in run]) for run in runs]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(pixels[3], pixels[2], strict=True)]
    alike = [torch.equal(a, b) for a, b in zip(pixels[3], pixels[2], strict=True)]
    assert all(a != b for a, b in zip(mirrored, alike, strict=True)) and 0 < sum(mirrored) < 8
    assert not any(torch.equal(a, b) for a, b in zip(pixels[4], pixels[2], strict=True))


def test_random_crop_stays_in_the_image_and_keeps_to_its_scale():
    width, height = 64, 48
    columns = numpy.tile(numpy.arange(width, dtype=numpy.uint8), (height, 1))
    rows = numpy.tile(numpy.arange(height, dtype=numpy.uint8)[:, None], (1, width))
    image = Image.fromarray(numpy.stack([columns, rows, columns], axis=-1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        part = numpy.asarray(pictures.random_crop(image, (24, 32), (0.25, 0.5), generator), dtype=float)
        assert part.shape == (24, 32, 3)
        spans = [(part[..., axis].max() - part[..., axis].min() + 1) / side for axis, side in ((0, width), (1, height))]
        assert 0.2 < spans[0] * spans[1] < 0.6  # to a pixel's rounding


# Boxes


def test_boxes_reach_the_loss_as_shares_of_the_image(folders, tmp_path):
    found = {"bbox": [[4, 6, 20, 12], [0, 0, 40, 30]], "category": ["cat", "dog"], "iscrowd": [0, 1]}
    data = box_folder(tmp_path / "data", [found, found])
    corners = box_folder(tmp_path / "corners", [{"bbox": [[4, 6, 24, 18]], "category": ["cat"]}] * 2)
    task = build(folders, "object-detection", data, holdout=1)
    other = build(folders, "object-detection", corners, holdout=1, task_options={"box_format": "xyxy"})
    for labels in (task._collate([task.train[0]])["labels"], other._collate([other.train[0]])["labels"]):
        torch.testing.assert_close(labels[0]["boxes"], torch.tensor([[14 / 40, 12 / 30, 20 / 40, 12 / 30]]))
        assert labels[0]["class_labels"].tolist() == [0]  # a crowd is nothing to be found
    # mirrored: the centre moves to the other side
    seen = {round(batch["labels"][0]["boxes"][0, 0].item(), 4) for batch in task.batches()}
    assert seen == {0.35, 0.65}
    model = task.model()
    batch = task._collate([task.train[0]])
    whole = model(pixel_values=batch["pixel_values"], labels=batch["labels"])
    torch.testing.assert_close(task.loss(model, batch), whole.loss)


def test_a_model_that_finds_every_box_scores_one(folders, tmp_path):
    rows = [
        {"bbox": [[4, 6, 20, 12], [1, 2, 8, 9]], "category": ["dog", "cat"]},
        {"bbox": [[10, 10, 30, 20]], "category": ["dog"]},
    ]
    data = box_folder(box_folder(tmp_path / "data", rows), rows, "test")
    task = build(folders, "object-detection", data, test_split="test")
    assert task.classes == ["cat", "dog"]

    class Oracle(torch.nn.Module):
        """Answers in queries as YOLOS does, shares of the image and a last class for nothing; `shift` of a box's width."""

        def __init__(self, shift):
            super().__init__()
            self.shift, self.image = shift, -1

        def forward(self, pixel_values):
            self.image = (self.image + 1) % len(rows)
            answers = torch.zeros(1, 3, 4), torch.full((1, 3, 3), -9.0)
            answers[1][..., 2] = 9.0
            for query, (box, name) in enumerate(zip(*rows[self.image].values(), strict=True)):
                x, y, width, height = box
                centre = ((x + width * (0.5 + self.shift)) / 40, (y + height / 2) / 30)
                answers[0][0, query] = torch.tensor([*centre, width / 40, height / 30])
                answers[1][0, query, task.classes.index(name)] = (
                    8.0  # less sure than of nothing, and still the best class
                )
            return SimpleNamespace(pred_boxes=answers[0], logits=answers[1])

    assert task.evaluate(Oracle(0.0)) == pytest.approx({"map": 1, "map_50": 1, "map_75": 1})
    # moved by a quarter of its width a box overlaps by 0.75 / 1.25 = 0.6: enough for 0.50 and 0.55, and at 0.60 rounding decides
    moved = task.evaluate(Oracle(0.24))
    assert moved == pytest.approx({"map": 0.3, "map_50": 1, "map_75": 0})


def test_the_models_own_classes_are_taken_by_name(folders, tmp_path):
    rows = [{"bbox": [[1, 1, 9, 9]], "category": ["dog"]}, {"bbox": [[1, 1, 9, 9]], "category": ["cat"]}]
    data = box_folder(tmp_path / "data", rows)
    both = {"eval_data": str(data), "test_split": "train", "task_options": {"classes": "model"}}
    task = build(folders, "object-detection", data, **both)
    labels = [task._collate([task.train[row]])["labels"][0]["class_labels"].item() for row in range(2)]
    assert labels == [18, 17] and [task.model().config.id2label[number] for number in labels] == ["dog", "cat"]
    rows[0]["category"] = ["unicorn"]
    with pytest.raises(ValueError, match="got 'model' for a model without 'unicorn'"):
        build(folders, "object-detection", box_folder(tmp_path / "other", rows), **both)


# Diffusion


def test_subject_batches_hold_all_that_is_random(folders, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        picture(i, (90, 70)).save(data / f"{i}.png")
    options = {"resolution": 64, "prompt": "a photo of sks dog", "test_draws": 5}
    task = build(folders, "subject-generation", data, holdout=1, task_options=options)
    again = build(folders, "subject-generation", data, holdout=1, task_options=options)
    assert len(task.train) == 2 and len(task.test) == 1
    first, repeated = next(task.batches()), next(again.batches())
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert first["time_ids"].tolist() == [[70, 90, 0, (round(90 * 64 / 70) - 64) // 2, 64, 64]] * 2
    # the noise is what was added: the latents come back from it
    share = task.scheduler.alphas_cumprod[first["timestep"]].view(-1, 1, 1, 1)
    latents = (first["sample"] - (1 - share).sqrt() * first["target"]) / share.sqrt()
    vae = task._vae()
    names = [task.train[row] for row in task._order[:2].tolist()]
    spread = torch.stack([item["std"] for item in names])
    assert ((latents - torch.stack([item["mean"] for item in names])).abs() < 6 * spread + 1e-4).all()
    source = pictures.picture(task.data.train, int(task._order[0]))
    assert source.size == (90, 70)
    middle = numpy.asarray(source.resize((82, 64), resample=Image.Resampling.BILINEAR), dtype=numpy.float32)[:, 9:73]
    with torch.no_grad():
        encoded = vae.encode(torch.from_numpy(middle / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist
    torch.testing.assert_close(names[0]["mean"], encoded.mean[0] * 0.13025)  # SDXL's factor
    torch.testing.assert_close(names[0]["std"], encoded.std[0] * 0.13025)
    model = task.model()
    states, pooled = task._text
    words = task._part("CLIPTokenizer", "tokenizer")(options["prompt"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        read = [
            task._part(kind, f"text_encoder{end}")(words["input_ids"], output_hidden_states=True)
            for kind, end in (("CLIPTextModel", ""), ("CLIPTextModelWithProjection", "_2"))
        ]
    torch.testing.assert_close(states, torch.cat([one.hidden_states[-2] for one in read], dim=-1))
    torch.testing.assert_close(pooled, read[1].text_embeds)
    predicted = model(
        first["sample"],
        first["timestep"],
        encoder_hidden_states=states.expand(2, -1, -1),
        added_cond_kwargs={"text_embeds": pooled.expand(2, -1), "time_ids": first["time_ids"]},
    ).sample
    torch.testing.assert_close(task.loss(model, first), (predicted - first["target"]).square().mean())
    timesteps = [step for batch in task.test_batches() for step in batch["timestep"].tolist()]
    assert timesteps == [100, 300, 500, 700, 900]
    losses = [task.loss(model, batch).item() * len(batch["sample"]) for batch in task.test_batches()]
    assert task.evaluate(model)["noise_loss"] == pytest.approx(sum(losses) / 5)


def test_what_a_run_writes_is_loaded_by_diffusers(folders, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        picture(i, (64, 64)).save(data / f"{i}.png")
    spec = FinetuneSpec(
        model=str(folders["subject-generation"]),
        data=str(data),
        task="subject-generation",
        data_dir=str(tmp_path),
        holdout=1,
        method="nora",
        r=2,
        r_out=4,
        lora_alpha=3,
        lr=1e-2,
        target_modules=("to_q", "to_k", "to_v", "to_out.0"),
        steps=3,
        batch_size=2,
        compare=False,
        device="cpu",
        task_options={"resolution": 64, "test_draws": 1},
    )
    report = run(spec, out=tmp_path / "out")
    assert (tmp_path / "out" / "diffusers").is_dir() and "diffusers" in report.files
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    conditions = {"text_embeds": words[:, 0, :16], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    unets = [
        diffusers.UNet2DConditionModel.from_pretrained(spec.model, subfolder="unet", local_files_only=True)
        for _ in range(3)
    ]
    name = "pytorch_lora_weights.safetensors"
    unets[1].load_lora_adapter(tmp_path / "out" / "diffusers", prefix="unet", weight_name=name)
    unets[2] = peft.PeftModel.from_pretrained(unets[2], str(tmp_path / "out" / "adapter"))
    with torch.no_grad():
        plain, theirs, stock = (
            unet.eval()(noise, 500, encoder_hidden_states=words, added_cond_kwargs=conditions).sample for unet in unets
        )
    assert torch.equal(theirs, stock) and not torch.allclose(theirs, plain, atol=1e-4)


# What bad data are told


def test_missing_damaged_and_unnamed_images(folders, tmp_path):
    data = class_folder(tmp_path / "data")
    file = tmp_path / "rows.jsonl"
    rows = [{"image": "data/train/cat/0.png", "label": "a"}, {"image": "data/train/cat/9.png", "label": "b"}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"must be a file that exists, got '.*data/train/cat/9.png'"):
        build(folders, "image-classification", file, holdout=1)
    (data / "train" / "cat" / "0.png").write_bytes(b"no image")
    task = build(folders, "image-classification", data, test_split="test")
    with pytest.raises(ValueError, match=r"one that PIL reads, got row 0: .*0\.png"):
        task.train[0]
    file.write_text("\n".join(json.dumps({"image": i, "label": "ab"[i % 2]}) for i in range(4)))
    with pytest.raises(ValueError, match="image column of the train data must hold images, got Value"):
        build(folders, "image-classification", file, holdout=1)


def test_unknown_labels(folders, tmp_path):
    data = class_folder(tmp_path / "data")
    (data / "test" / "cat").rename(data / "test" / "owl")
    with pytest.raises(ValueError, match="one of the 2 classes of the training data, got"):
        build(folders, "image-classification", data / "train", eval_data=str(data / "test"), test_split="train")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"image": f"data/train/cat/{i}.png", "label": "a"}) for i in range(3)))
    with pytest.raises(ValueError, match="at least two classes to train on, got a"):
        build(folders, "image-classification", file, holdout=1)


@pytest.mark.parametrize(
    ("objects", "told"),
    [
        (
            {"bbox": [[30, 5, 20, 10]], "category": ["a"]},
            r"lie in its image of 40 × 30 pixels, got \[30.0, 5.0, 50.0, 15.0\]",
        ),
        (
            {"bbox": [[30, 5, -4, 10]], "category": ["a"]},
            r"width and height ≥ 0 as xywh, got \[30, 5, -4, 10\] in row 1",
        ),
        ({"bbox": [[1, 5, 3, float("nan")]], "category": ["a"]}, "4 finite numbers"),
        (
            {"bbox": [[1, 5, 3, 4], [1, 1, 2, 2]], "category": ["a"]},
            "as many 'category' as boxes, got 1 and 2 in row 1",
        ),
        ({"bbox": [[1, 5, 3]], "category": ["a"]}, "4 finite numbers"),
    ],
)
def test_bad_boxes(folders, tmp_path, objects, told):
    data = box_folder(tmp_path / "data", [{"bbox": [[1, 2, 3, 4]], "category": ["a"]}, objects])
    with pytest.raises(ValueError, match=told):
        task = build(folders, "object-detection", data, eval_data=str(data), test_split="train")
        list(task.test_batches())


def test_boxes_are_held_to_known_sizes_before_an_image_is_read(folders, tmp_path):
    rows = [{"bbox": [[30, 5, 20, 10]], "category": ["a"]}] * 2
    data = box_folder(tmp_path / "data", rows, w=50, h=30)
    sizes = {"holdout": 1, "columns": {"width": "w", "height": "h"}}
    assert len(build(folders, "object-detection", data, **sizes).train) == 1
    data = box_folder(tmp_path / "small", rows, w=40, h=30)
    with pytest.raises(ValueError, match="lie in its image of 40 × 30 pixels"):
        build(folders, "object-detection", data, **sizes)


def test_objects_of_other_names(folders, tmp_path):
    data = box_folder(tmp_path / "data", [{"box": [[1, 2, 3, 4]], "category": ["a"]}] * 2)
    with pytest.raises(ValueError, match="objects must have the field 'bbox' .*, got box, category"):
        build(folders, "object-detection", data, holdout=1)
    task = build(folders, "object-detection", data, holdout=1, task_options={"box": "box"})
    assert task.train[0]["boxes"].tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("task", "options", "told"),
    [
        ("image-classification", {"crop": 0}, r"task_options.crop must be in \(0, 1\], got 0"),
        ("image-classification", {"workers": -1}, "task_options.workers must be an integer ≥ 0, got -1"),
        ("object-detection", {"box_format": "yxyx"}, "box_format must be one of xywh, xyxy"),
        ("clip-few-shot", {"prompt": "a photo"}, "prompt must be a text with one {}"),
        ("subject-generation", {"resolution": 30}, "resolution must be a multiple of 8, got 30"),
    ],
)
def test_bad_options(task, options, told):
    with pytest.raises(ValueError, match=told):
        task_class(task).check(FinetuneSpec(model="m", data="d", task=task, task_options=options))


def test_made_up_boxes_lie_in_their_images():
    generator = random.Random(0)
    for format in ("xywh", "xyxy"):
        for _ in range(50):
            made = synthetic_images.objects(generator, {"classes": ["a", "b"], "size": [40, 30], "format": format}, {})
            for x, y, third, fourth in made["bbox"]:
                right, bottom = (third, fourth) if format == "xyxy" else (x + third, y + fourth)
                assert 0 <= x <= right <= 40.001 and 0 <= y <= bottom <= 30.001

"""Linear probing and k-NN classification on the frozen features of an image tokenizer.

The linear probe follows MAE (arXiv 2111.06377, appendix A.2): BatchNorm without affine parameters and one linear layer,
LARS, no weight decay, a cosine schedule after a warm-up, learning rate base x batch / 256. Two things are scaled down:
images are center crops and their mirror images, encoded once, and the batch is smaller. The base rate is chosen on a
held-out tenth of the training images, then a head is trained on all of them; test images choose nothing. The k-NN
classifier is DINO's (arXiv 2104.14294, appendix F.1): k nearest by cosine, weighted by exp(cosine / 0.07).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from unimm.data.resizing import crop
from unimm.data.sources.labelled import labelled_images
from unimm.errors import UserError
from unimm.evaluation.probe.lars import LARS
from unimm.evaluation.runs.image_sets import Bad
from unimm.tokenizer import ImageTokenizer

Kind = Literal["features", "latents", "codes", "lookup"]
KINDS: tuple[Kind, ...] = ("features", "latents", "codes", "lookup")
VOTE_TEMPERATURE = 0.07


@dataclass(frozen=True)
class ProbePlan:
    """The settings of a probe.

    Args:
        source, test_source: labeled parquet files, or "shapes".
        num_train, num_test: number of images; None takes all.
        level: index of the encoder's hidden state that is used as features; None takes the tokenizer's own.
        kinds: features, latents (before the quantizer), codes (after it) and lookup (the codes of the ids), each
            averaged over its tokens.
        base_rates: base learning rates of the sweep; a learning rate is base x batch_size / 256.
        neighbours: k of the k-NN classifier.
    """

    source: str
    test_source: str
    num_train: int | None = None
    num_test: int | None = None
    level: int | None = None
    kinds: Sequence[Kind] = KINDS
    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 1024
    base_rates: Sequence[float] = (0.1, 0.3, 1.0, 3.0)
    flip: bool = True
    neighbours: int = 20
    seed: int = 0


def probe_tokenizer(
    tokenizer: ImageTokenizer, image_processor: Any, plan: ProbePlan, bad: Bad | None = None
) -> dict[str, dict[str, Any]]:
    """Probe the representations of a tokenizer.

    Args:
        bad: called for each image that cannot be read, which is left out; without it, the error is raised.

    Returns:
        {kind: {"linear", "knn": test accuracies, "base_rate": the chosen one, "sweep": {rate: held-out accuracy}}}.

    Raises:
        UserError: images cannot be read, the encoder does not have the level, or a kind is unknown.
    """
    if unknown := sorted(set(plan.kinds) - set(KINDS)):
        raise UserError(f"There is no representation {unknown[0]!r}; known are {', '.join(KINDS)}.")
    # two seeds: both sets may come from one generated source ("shapes")
    train = labelled_images(plan.source, plan.num_train, seed=2 * plan.seed)
    test = labelled_images(plan.test_source, plan.num_test, seed=2 * plan.seed + 1)
    train_tables, train_labels = embed(tokenizer, image_processor, train, plan, flip=plan.flip, bad=bad)
    test_tables, test_labels = embed(tokenizer, image_processor, test, plan, flip=False, bad=bad)
    return {
        kind: probe(train_tables[kind], train_labels, test_tables[kind], test_labels, plan, 2 if plan.flip else 1)
        for kind in plan.kinds
    }


def random_twin(tokenizer: ImageTokenizer, seed: int = 0) -> ImageTokenizer:
    """Return the same architecture with random weights: the baseline that a trained tokenizer must beat."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = type(tokenizer.config).from_dict(tokenizer.config.to_dict())
        return type(tokenizer)._from_config(config).eval().to(tokenizer.device)


# ---- images -> one vector each ----


def embed(
    tokenizer: ImageTokenizer,
    image_processor: Any,
    raw_images: Any,
    plan: ProbePlan,
    *,
    flip: bool,
    bad: Bad | None = None,
) -> tuple[dict[Kind, Tensor], Tensor]:
    """Embed all images; return {kind: [n, width]} and labels [n]. With `flip`, each image's mirror image is the next
    row."""
    tables: dict[Kind, list[Tensor]] = {kind: [] for kind in plan.kinds}
    labels: list[int] = []
    for images, classes in _batches(raw_images, tokenizer.config.image_size, flip, bad):
        pixel_values = image_processor(images=images, return_tensors="pt").pixel_values.to(tokenizer.device)
        for kind, vectors in mean_vectors(tokenizer, pixel_values, plan.kinds, plan.level).items():
            tables[kind].append(vectors.cpu())
        labels += classes
    return {kind: torch.cat(rows) for kind, rows in tables.items()}, torch.tensor(labels)


@torch.inference_mode()
def mean_vectors(
    tokenizer: ImageTokenizer, pixel_values: Tensor, kinds: Sequence[Kind], level: int | None
) -> dict[Kind, Tensor]:
    """Encode pixel_values [B, 3, H, W] to {kind: [B, width]} in float32, means over patches or image tokens.

    Raises:
        UserError: the encoder has no such level.
    """
    encoded = tokenizer.encode(pixel_values)
    found: dict[Kind, Tensor] = {"latents": encoded.latents, "codes": encoded.codes}
    if "features" in kinds:
        found["features"] = encoded.features if level is None else _level(tokenizer, pixel_values, level)
    if "lookup" in kinds:
        found["lookup"] = tokenizer.lookup(encoded.ids)
    return {kind: found[kind].float().mean(dim=1) for kind in kinds}


def _level(tokenizer: ImageTokenizer, pixel_values: Tensor, level: int) -> Tensor:
    states = tokenizer.hidden_states(pixel_values)
    if not -len(states) <= level < len(states):
        raise UserError(
            f"The encoder has the levels 0 (embeddings) to {len(states) - 1}, or from the end -1 to -{len(states)}; "
            f"there is no level {level}."
        )
    return states[level]


def _batches(
    raw_images: Any, size: int, flip: bool, bad: Bad | None, batch_size: int = 64
) -> Iterator[tuple[list, list[int]]]:
    for start in tqdm(range(0, len(raw_images), batch_size), desc="images", unit="batch"):
        rows = []
        for index in range(start, min(start + batch_size, len(raw_images))):
            try:
                rows.append(raw_images[index])
            except UserError as error:
                if bad is None:
                    raise
                bad(f"row {index}", error)
        if not rows:
            continue
        images, classes = [crop(row["image"], size) for row in rows], [row["label"] for row in rows]
        if flip:
            images = [each for image in images for each in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
            classes = [label for label in classes for _ in range(2)]
        yield images, classes


# ---- vectors -> accuracies ----


def probe(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, plan: ProbePlan, copies: int = 1
) -> dict[str, Any]:
    """Evaluate both classifiers on vectors train [n, width] and test [m, width]; returns as `probe_tokenizer`.

    Each `copies` consecutive rows of train come from one image.

    Raises:
        UserError: there are fewer than two classes or ten training vectors, or a test class is not in the training set.
    """
    classes = int(labels.max()) + 1
    if int(labels.min()) < 0 or len(labels.unique()) < 2 or len(train) < 10 or int(test_labels.max()) >= classes:
        raise UserError(
            f"{len(train)} training vectors of {len(labels.unique())} classes and test labels up to "
            f"{int(test_labels.max())}: a probe needs ten vectors, two classes and no class that only the test shows."
        )
    order = torch.randperm(len(train) // copies, generator=torch.Generator().manual_seed(plan.seed))
    held_out = torch.zeros(len(order), dtype=torch.bool)
    held_out[order[: max(1, len(order) // 10)]] = True
    held_out = held_out.repeat_interleave(copies)  # an image and its mirror image stay together
    sweep = {}
    for rate in plan.base_rates:
        head = train_head(train[~held_out], labels[~held_out], classes, rate, plan)
        sweep[rate] = accuracy(head, train[held_out], labels[held_out])
    best = max(sweep, key=lambda rate: sweep[rate])
    head = train_head(train, labels, classes, best, plan)
    votes = vote(train, labels, test, plan.neighbours)
    return {
        "linear": accuracy(head, test, test_labels),
        "knn": float((votes == test_labels).double().mean()),
        "base_rate": best,
        "sweep": {str(rate): value for rate, value in sweep.items()},
    }


def train_head(vectors: Tensor, labels: Tensor, classes: int, base_rate: float, plan: ProbePlan) -> nn.Sequential:
    """Train BatchNorm1d and a linear layer on vectors [n, width]; return them in evaluation mode."""
    generator = torch.Generator().manual_seed(plan.seed)
    linear = nn.Linear(vectors.shape[1], classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(vectors.shape[1], affine=False, eps=1e-6), linear)
    batch = min(plan.batch_size, len(vectors))
    steps = len(vectors) // batch
    optimizer = LARS(linear.parameters(), lr=base_rate * batch / 256)
    warmup = min(plan.warmup_epochs, plan.epochs) * steps
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, plan.epochs * steps)
    for _ in range(plan.epochs):
        order = torch.randperm(len(vectors), generator=generator)
        for rows in order[: steps * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(head(vectors[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return head.eval()


@torch.no_grad()
def accuracy(head: nn.Module, vectors: Tensor, labels: Tensor) -> float:
    """Return the share of vectors [n, width] whose largest output is their label."""
    return float((head(vectors).argmax(dim=1) == labels).double().mean())


@torch.no_grad()
def vote(train: Tensor, labels: Tensor, test: Tensor, neighbours: int) -> Tensor:
    """Return the class [m] of each test vector [m, width], voted by its nearest training vectors [n, width]."""
    train, classes = F.normalize(train, dim=1), int(labels.max()) + 1
    verdicts = []
    for chunk in F.normalize(test, dim=1).split(256):
        near = (chunk @ train.t()).topk(min(neighbours, len(train)), dim=1)
        weights = (near.values / VOTE_TEMPERATURE).exp()
        votes = torch.zeros(len(chunk), classes).scatter_add_(1, labels[near.indices], weights)
        verdicts.append(votes.argmax(dim=1))
    return torch.cat(verdicts)

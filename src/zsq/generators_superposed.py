"""Qimera's generator: latents that lie between the embeddings of several classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.generators import ConditionalGenerator

_DISENTANGLED = 100  # length of the latent behind the disentanglement mapping, in all released settings


def soft_labels(classes: Tensor, weights: Tensor, count: int) -> Tensor:
    """Distribute weights over classes; a class that was drawn twice gets both.

    Args:
        classes: class numbers, int64 [b, K] (or [b]).
        weights: of the same shape; rows sum to 1.
        count: number of classes k.

    Returns:
        Soft targets [b, k].

    Source: Qimera (arXiv 2111.02625), section 4.1.

    Example:
        >>> soft_labels(torch.tensor([[0, 2, 2]]), torch.tensor([[0.5, 0.25, 0.25]]), 3)
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    rows = len(classes)
    target = weights.new_zeros(rows, count)
    return target.scatter_add(1, classes.view(rows, -1), weights.view(rows, -1))


class SuperposedGenerator(ConditionalGenerator):
    """GDFQ's generator behind Qimera's embedding stage.

    e_k = E[y_k] + z_k, standardised, then mixed: h = sum_k weight_k e_k. The disentanglement mapping is linear and the
    weights sum to 1, so it is applied once, after mixing. Above 64 pixels the BatchNorms' class tables are mixed too.

    Args:
        classes: number of classes k.
        image: (channels, height, width) of the images.
        features: length of an embedding D.
        embedding: initial embedding [k, D], e.g. the teacher's classifier; None for N(0, 1).
        disentangle: map the mixed embedding to 100 numbers before the first layer.
        statistics: standardise every embedding over its features ("sample"), or in superposed batches each slot over
            batch and features ("slot"), as the released code does.
        mixing: class tables of the BatchNorms: weighted "sum", or that sum divided by K ("mean"), as the released code
            does, which makes superposed images blank.
        conditional: as in `ConditionalGenerator`.

    Raises:
        BadInput: as in `ConditionalGenerator`.

    Source: Qimera (arXiv 2111.02625), the released networks.

    Example:
        >>> net = SuperposedGenerator(10, (3, 32, 32), 64)
        >>> net(torch.randn(4, 2, 64), torch.randint(10, (4, 2)), torch.full((4, 2), 0.5)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        classes: int,
        image: tuple[int, int, int],
        features: int,
        *,
        embedding: Tensor | None = None,
        disentangle: bool = False,
        statistics: Literal["sample", "slot"] = "sample",
        mixing: Literal["sum", "mean"] = "sum",
        conditional: bool | None = None,
    ) -> None:
        super().__init__(classes, image, _DISENTANGLED if disentangle else features, conditional=conditional)
        self.latent, self.statistics, self.mixing = features, statistics, mixing
        self.embedding = nn.Embedding(classes, features)
        if embedding is not None:
            with torch.no_grad():
                self.embedding.weight.copy_(embedding)
        self.disentangle = nn.Linear(features, _DISENTANGLED) if disentangle else None

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Give [b, D] or [b, K, D] mean 0 and variance 1, over the dimensions that `statistics` names."""
        over = (0, 2) if embeddings.dim() == 3 and self.statistics == "slot" else (embeddings.dim() - 1,)
        var, mean = torch.var_mean(embeddings, dim=over, correction=0, keepdim=True)
        return (embeddings - mean) * (var + 1e-5).rsqrt()

    def superpose(self, z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Give the input of the first linear layer, shape [b, D] (or [b, 100] behind the mapping)."""
        h = self.standardise(F.embedding(labels, self._table()) + z)
        h = (weights[..., None] * h).sum(1) if h.dim() == 3 else h
        return h if self.disentangle is None else self.disentangle(h)

    def embed(self, z: Tensor, labels: Tensor) -> Tensor:
        """Take the latent as it is: `superpose` has made it."""
        return z

    def forward(self, z: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Make images.

        Args:
            z: noise, shape [b, D] for images of one class, [b, K, D] for superposed ones.
            labels: int64 class numbers, [b] or [b, K].
            weights: of the classes, rows summing to 1; unused for images of one class.

        Returns:
            Images [b, c, h, w], mean 0 and variance 1 per channel over the batch.
        """
        weights = torch.ones_like(labels, dtype=z.dtype) if weights is None else weights
        h = self.superpose(z, labels, weights)
        if labels.dim() == 2:
            labels = soft_labels(labels, weights / (labels.shape[1] if self.mixing == "mean" else 1), self.classes)
        return super().forward(h, labels)

    def _table(self) -> Tensor:
        return self.get_parameter("embedding.weight")

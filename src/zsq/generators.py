"""Generators: networks that turn latent noise and class labels into images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.few_outputs import FewConv

LATENT = 100  # length of GDFQ's latent vector
_LARGEST_EMBEDDED = 64  # pixels; above it GDFQ conditions through the BatchNorms instead of the latent
# Published value of both hidden BatchNorms: an argument slip in the original, but it changes the function.
HIDDEN_EPS = 0.8


def lookup(table: Tensor, labels: Tensor) -> Tensor:
    """Give rows of a [k, d] table: by class number (int64 [b]), or mixed by soft labels ([b, k])."""
    return labels.to(table.dtype) @ table if labels.is_floating_point() else F.embedding(labels, table)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise with the statistics of this batch, always: without buffers, sampling changes no state."""
    if weight is None and x.dtype == torch.bfloat16:  # float32 parameters keep the statistics in float32
        weight, bias = x.new_ones(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float32)
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


class _Box(torch.autograd.Function):
    """Sums of 2x2 neighbours, [b, c, h+1, w+1] to [b, c, h, w]; the gradient is such a sum too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, 1, divisor_override=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return F.avg_pool2d(grad, 2, 1, padding=1, divisor_override=1)


def conv_of_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest-neighbour x2 followed by a convolution that keeps the size, with a quarter of its operations.

    The enlarged image is one with every second pixel zero, summed over 2x2 neighbours. A convolution and such a sum can
    change places, and a convolution of an image that is mostly zero is a transposed one of the small image. Four times
    fewer operations and one sum, in the forward pass and for both gradients. Exact up to rounding.

    Args:
        x: [b, inputs, h, w].
        weight: [outputs, inputs, k, k], k odd.
        bias: [outputs], or None.

    Returns:
        [b, outputs, 2h, 2w].
    """
    if weight.shape[2] == 1:
        return F.interpolate(F.conv2d(x, weight, bias), scale_factor=2.0)
    last = weight.is_contiguous(memory_format=torch.channels_last)  # kernels of other strides are several times slower
    layout = torch.channels_last if last else torch.contiguous_format
    turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=layout)
    y: Tensor = _Box.apply(F.conv_transpose2d(x, turned, stride=2, padding=weight.shape[2] // 2 - 1))
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]  # with a bias oneDNN's kernel is far slower


class UpConv(nn.Conv2d):
    """Nearest-neighbour x2 followed by a padded 3x3 convolution, as one operation (`conv_of_doubled`).

    A BatchNorm that subtracts the mean of the batch has to come next. The bias then has no effect and no gradient but
    rounding errors: it is kept, as in the published network, and left out.

    Args:
        inputs: channels in.
        outputs: channels out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, 2h, 2w]."""
        return conv_of_doubled(input, self.weight, None)


class BatchStatsNorm(nn.Module):
    """BatchNorm that always uses the statistics of the batch and stores none; optionally with one affine map per class.

    Args:
        channels: channels of the input.
        eps: added to the variance.
        classes: None for one learned scale and offset; a number for one pair per class (conditional BatchNorm).
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, classes: int | None = None) -> None:
        super().__init__()
        shape = (channels,) if classes is None else (classes, channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Normalise [b, channels, h, w]; labels are int64 [b] or soft [b, classes], and unused without classes."""
        if self.weight.dim() == 1:
            return batch_norm(x, self.weight, self.bias, self.eps)
        return self.affine(batch_norm(x, None, None, self.eps), labels)

    def affine(self, normalised: Tensor, labels: Tensor) -> Tensor:
        """Apply only the scales and offsets of the classes; for readers that share one normalised tensor."""
        tables = (self.weight, self.bias)
        scale, offset = (lookup(table, labels)[:, :, None, None].to(normalised.dtype) for table in tables)
        return torch.addcmul(offset, normalised, scale)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, eps={self.eps}"


class ConditionalGenerator(nn.Module):
    """GDFQ's label-conditional generator, for images of any size divisible by 4.

    Latent -> linear -> [128, h/4, w/4] -> BatchNorm -> twice (x2, conv 3x3, BatchNorm, LeakyReLU 0.2) -> conv 3x3 ->
    tanh -> BatchNorm without parameters, so a batch has mean 0 and variance 1 per channel. All BatchNorms use the
    statistics of the batch, in either mode. Override `embed` for another label embedding.

    Args:
        classes: number of classes k.
        image: (channels, height, width) of the images.
        latent: length of the latent vector z.
        conditional: where labels enter: False multiplies z by a learned class embedding, True gives each hidden
            BatchNorm one scale and offset per class, None takes the published choice (True above 64 pixels).
        rng: source of the initial weights (CPU generator); None takes torch's global one.

    Raises:
        BadInput: a size is not divisible by 4, or a count is not positive.

    Source: GDFQ (arXiv 2003.03603), the released networks.

    Example:
        >>> net = ConditionalGenerator(10, (3, 32, 32))
        >>> net(torch.randn(4, 100), torch.arange(4)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        classes: int,
        image: tuple[int, int, int],
        latent: int = LATENT,
        *,
        conditional: bool | None = None,
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.image, self.latent = classes, image, latent
        self.conditional = max(image[1:]) > _LARGEST_EMBEDDED if conditional is None else conditional
        self._check()
        channels, height, width = image
        per_class = classes if self.conditional else None
        with torch.random.fork_rng(devices=[], enabled=rng is not None):
            if rng is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            self.embedding = None if self.conditional else nn.Embedding(classes, latent)
            self.linear = nn.Linear(latent, 128 * (height // 4) * (width // 4))
            self.norm0 = BatchStatsNorm(128, classes=per_class)
            self.conv1 = UpConv(128, 128)
            self.norm1 = BatchStatsNorm(128, eps=HIDDEN_EPS, classes=per_class)
            self.conv2 = UpConv(128, 64)
            self.norm2 = BatchStatsNorm(64, eps=HIDDEN_EPS, classes=per_class)
            self.conv3 = FewConv(64, channels)

    def _check(self) -> None:
        channels, height, width = self.image
        if min(self.classes, self.latent, channels) < 1:
            raise BadInput(
                "generator",
                expected="at least one class, one latent entry and one image channel",
                got=f"classes {self.classes}, latent {self.latent}, channels {channels}",
                fix="Give positive numbers.",
            )
        if height % 4 or width % 4 or min(height, width) < 4:
            near = " or ".join(dict.fromkeys(f"{_nearest(height, up)}x{_nearest(width, up)}" for up in (0, 1)))
            raise BadInput(
                "image size",
                expected="height and width divisible by 4 (the generator doubles its grid twice)",
                got=f"{height}x{width}",
                fix=f"Nearest sizes: {near}.",
            )

    def embed(self, z: Tensor, labels: Tensor) -> Tensor:
        """Give the input of the first linear layer, shape [b, latent]."""
        return z if self.embedding is None else lookup(self.embedding.weight, labels) * z

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Make images.

        Args:
            z: latent noise, shape [b, latent].
            labels: int64 class numbers [b], or soft labels [b, classes], which mix the class tables linearly.

        Returns:
            Images [b, c, h, w], mean 0 and variance 1 per channel over the batch; float32 under autocast.
        """
        _, height, width = self.image
        x = self.linear(self.embed(z, labels)).unflatten(1, (128, height // 4, width // 4))
        last = self.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        x = self.norm0(x, labels)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = F.leaky_relu(norm(conv(x), labels), 0.2, inplace=True)
        x = self.conv3(x)
        # Half precision ends here: its rounding would show as banding in the image. Statistics of few channels are
        # several times faster over contiguous ones.
        x = (x if x.dtype == torch.float64 else x.float()).contiguous().tanh()
        return batch_norm(x, None, None, 1e-5).contiguous(memory_format=layout)


def _nearest(size: int, up: int) -> int:
    """Multiple of 4 just below (up=0) or above (up=1) a size, at least 4; the size itself if it is one."""
    return max(4, (size + 3 * up) // 4 * 4)


class AddingGenerator(ConditionalGenerator):
    """GDFQ's network with the label's embedding added to the latent, not multiplied into it.

    The product of an embedding and a symmetric z has mean zero whatever the label: the class is only in second moments,
    and with 100 classes the network does not find it within hundreds of steps. The sum has the class in its mean:
    dozens of steps are enough.

    Args:
        classes, image, latent, rng: as in `ConditionalGenerator`.
        strength: factor on the embedding, which starts as N(0, 1).

    Raises:
        BadInput: as in `ConditionalGenerator`.

    Source: own; the label input of GDFQ (arXiv 2003.03603), changed.

    Example:
        >>> net = AddingGenerator(100, (3, 32, 32))
        >>> net(torch.randn(4, 100), torch.arange(4)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self, classes: int, image: tuple[int, int, int], latent: int = 100, *, strength: float = 2.0,
        rng: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(classes, image, latent, conditional=False, rng=rng)
        self.strength = strength

    def embed(self, z: Tensor, labels: Tensor) -> Tensor:
        """Give the input of the first linear layer, shape [b, latent]."""
        if self.embedding is None:
            return z
        return torch.add(z, lookup(self.embedding.weight, labels), alpha=self.strength)

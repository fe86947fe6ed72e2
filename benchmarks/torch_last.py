"""The paper's `last` training step, written naively in PyTorch: `python benchmarks/torch_last.py`.

Prints one JSON object: the median seconds of an optimizer step of one window of 128,000 samples
at float32 without dropout, to hold against `python -m benchmarks.train_step --configs
last:128000`. PyTorch is no dependency of this project: install it elsewhere.
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch import nn


class Block(nn.Module):
    """A pre-norm Transformer block with heads as wide as the model."""

    def __init__(self, width: int = 128, heads: int = 8, mlp: int = 256):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query, self.key, self.value = (nn.Linear(width, heads * width) for _ in range(3))
        self.output = nn.Linear(heads * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.ReLU(), nn.Linear(mlp, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Encoder, Transformer and softmax head at the paper's size."""

    def __init__(self, patch: int = 2000, width: int = 128):
        super().__init__()
        self.patch, layers, channels, frames = patch, [], 1, patch
        for filters, stride in zip((256, 256, 128, 128, 32), (2, 3, 2, 3, 2), strict=True):
            layers += [nn.Conv1d(channels, filters, 7, stride), nn.ReLU()]
            channels, frames = filters, (frames - 7) // stride + 1
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(frames * channels, width))
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, 256)
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        patches = (codes.float() - 128).div(128).reshape(-1, 1, self.patch)
        tokens = self.encoder(patches).reshape(len(codes), codes.shape[1] // self.patch, -1)
        rates = torch.exp(-math.log(10_000) * torch.arange(64) / 64)
        angles = torch.arange(tokens.shape[1])[:, None] * rates
        tokens = tokens + torch.cat([angles.sin(), angles.cos()], -1)
        return self.head(self.blocks(tokens)[:, -1])


def main() -> None:
    """Parses the flags and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    flags = parser.parse_args()
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    codes = torch.randint(0, 256, (flags.windows, 128_001), dtype=torch.uint8)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(codes[:, :-1]), codes[:, -1].long())
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    square, rates, times = torch.ones(2048, 2048), [], []
    step()
    for _ in range(flags.runs):
        start = time.perf_counter()
        square @ square
        rates.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
        times.append(step())
    print(
        json.dumps(
            {
                "seconds": round(statistics.median(times), 3),
                "matmul_gflops_per_second": round(statistics.median(rates), 1),
                "windows": flags.windows,
                "parameters": sum(p.numel() for p in model.parameters()),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()

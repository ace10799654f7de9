"""scikit-learn's 8 x 8 digits, and what training with signs needs."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


class Sign(torch.autograd.Function):
    """-1 below zero, +1 elsewhere; the gradient passes where \\|x\\| <= 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x < 0, -1.0, 1.0).to(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


def train(model: nn.Module, epochs: int) -> float:
    """Trains on the first 1200 images; returns the accuracy on the others."""
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the work is too small for more
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(1200).split(100):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    torch.set_num_threads(threads)
    model.eval()
    return (model(images[1200:]).argmax(1) == labels[1200:]).double().mean().item()

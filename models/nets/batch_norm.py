"""Batch norm that can be trained on a batch of one behind a global pooling."""

from __future__ import annotations

import torch
from torch import nn


class PatientBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a batch has one value a channel, and learns none from it.

    The variance of one value is not defined: torch raises for a batch of one behind a global pooling. On every other
    batch, and in evaluation, it is nn.BatchNorm2d to the bit, with the same names of weights.
    Shape: (b, c, y, x) -> (b, c, y, x). Reference: Ioffe & Szegedy 2015, Batch Normalization.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  the name that torch gave it
        """Normalise."""
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def make_patient(network: nn.Module) -> nn.Module:
    """Replace every plain batch norm of a network, in place; weights keep their names and values."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                patient = PatientBatchNorm2d(child.num_features, eps=child.eps, momentum=child.momentum)
                patient.load_state_dict(child.state_dict())
                setattr(module, name, patient)
    return network

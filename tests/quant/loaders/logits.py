"""Whether a model computes what another does."""

import copy

import torch


def check_logits(model, plain):
    """``model`` errs against float64 no more than a few times what float32 itself does."""
    ids = torch.arange(20).reshape(2, 10)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(ids).logits
        found, usual = (m(ids).logits.double() - exact for m in (model, plain))
    assert found.norm() <= 4 * usual.norm() + 1e-7 * exact.norm()

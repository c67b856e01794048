"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum with orthogonalised updates.

The update of a weight matrix is its momentum M = U Σ Vᵀ with all singular values brought near 1, so that no direction
dominates. torch.optim.Muon takes matrices only; here the kernel of a convolution is one of outputs x (inputs · area).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

MOMENTUM = 0.95
ROUNDS = 5
# p(s) = a s + b s³ + c s⁵ brings every singular value in (0.01, 1] into (0.68, 1.21) in five rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# First and last layer, and whatever depends on timestep and class, are maps between spaces of different units: AdamW.
OTHERS = ("conv_in.", "conv_out.", "class_embedding.", "time_embedding.", "time_emb_proj.")


def orthogonaliser(gram: torch.Tensor) -> torch.Tensor:
    """Q with Q X ≈ U Vᵀ, for matrices X = U Σ Vᵀ with Frobenius norm 1, from their Gram matrices.

    A round of the iteration is X -> (a + b G + c G²) X with G = X Xᵀ. The factors commute with G, so that Q is their
    product and X itself is needed in no round.

    Args:
        gram: X Xᵀ, (N, n, n), float32.

    Returns:
        (N, n, n). The singular values of Q X are in (0.68, 1.21), where those of X are not below 0.01.
    """
    a, b, c = COEFFICIENTS
    one = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype).expand_as(gram)
    total = one
    for last in (*(False,) * (ROUNDS - 1), True):
        factor = torch.baddbmm(torch.add(a * one, gram, alpha=b), gram, gram, alpha=c)
        total = factor @ total
        if not last:
            gram = factor @ gram @ factor
    return total


class Muon(torch.optim.AdamW):
    """Muon for hidden weights with two or more dimensions, AdamW for all others.

    The root mean square of the updates is AdamW's, 0.2 (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that both
    have the same learning rate.

    Args:
        named_parameters: names and parameters of the model.
        **options: those of `torch.optim.AdamW`.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], **options: Any):
        named = list(named_parameters)
        hidden = [p.ndim >= 2 and not any(part in name for part in OTHERS) for name, p in named]
        super().__init__([{"params": [parameter for _, parameter in named], "hidden": hidden}], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the weights stay as they are if `found_inf`, as a GradScaler sets it, is 1."""
        group = self.param_groups[0]
        marked = zip(group["params"], group["hidden"], strict=True)
        if hidden := [parameter for parameter, is_hidden in marked if is_hidden and parameter.grad is not None]:
            self._update(hidden, group["lr"], group["weight_decay"])
            for parameter in hidden:
                parameter.grad = None  # AdamW passes over it
        return super().step(closure)

    def _update(self, parameters: list[torch.nn.Parameter], rate: float, decay: float) -> None:
        gradients = [p.grad.float() for p in parameters]  # type: ignore[union-attr]
        buffers = [self._buffer(p) for p in parameters]
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            found = found_inf.bool()
            gradients = [torch.where(found, buffer, g) for buffer, g in zip(buffers, gradients, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, buffers, MOMENTUM)  # Nesterov's
        torch._foreach_div_(updates, [norm + 1e-7 for norm in torch._foreach_norm(updates)])
        by_size: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for parameter, update in zip(parameters, updates, strict=True):
            matrix = update.flatten(1)
            matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
            by_size[matrix.shape[0]].append((parameter, matrix))
        for same in by_size.values():
            factors = orthogonaliser(torch.stack([matrix @ matrix.mT for _, matrix in same]))
            for (weight, matrix), factor in zip(same, factors, strict=True):
                update = factor @ matrix * (0.2 * rate * matrix.shape[1] ** 0.5)
                update = (update if len(weight) == len(matrix) else update.mT).reshape(weight.shape)
                if decay:
                    update = update + rate * decay * weight
                if found_inf is not None:
                    update = torch.where(found, 0.0, update)
                weight.sub_(update)

    def _buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] = torch.zeros(())  # which AdamW looks for in every state
        return state["momentum"]

"""What the training loss is made of, for a Trainer's logs, without synchronising with the device between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .objective import coefficients
from .recorder import Forward

Term = tuple[str, ...]  # ("task_loss",), or a layer's name, an adapter's and that of a term of the ELBO


class LossLog:
    """Sums of the parts of the loss since the last logging step, kept on the device."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Term, ...], Tensor] = {}
        self._first_step = 0

    def clear(self) -> None:
        """Forget all sums."""
        self._sums.clear()

    def add(self, task_loss: Tensor, forwards: Sequence[Forward], divisor: int, step: int) -> None:
        """Add a micro-batch.

        Args:
            task_loss: Its task loss, a scalar.
            forwards: Its forwards, whose ELBO is in the loss already.
            divisor: What the loss will be divided by.
            step: How many optimizer steps were done before this one.
        """
        terms: list[Term] = [("task_loss",)]
        values = [task_loss.detach().reshape(1)]
        for forward in forwards:
            for run in forward.runs:
                terms += [(*run.key, name) for name in coefficients(run.elbo.config)]
                values.append(
                    (run.elbo.weighted * (run.tokens * forward.per_token[run.key])).neg().to(task_loss.device)
                )
        part = torch.cat(values) / divisor
        if not self._sums:
            self._first_step = step
        known = self._sums.get(tuple(terms))
        self._sums[tuple(terms)] = part if known is None else known + part

    def means(self, step: int, reduce: Callable[[Tensor], Tensor], per_layer: bool) -> dict[str, float]:
        """The means over the optimizer steps since the last call; resets the sums.

        Args:
            step: How many optimizer steps are done now.
            reduce: Computes the mean over processes.
            per_layer: Whether to name each layer's terms too.

        Returns:
            ``"task_loss"``, ``"elbo/<term>"`` and, with `per_layer`, ``"elbo/<layer>/<term>"``. Empty if
            nothing was added.
        """
        steps = max(step - self._first_step, 1)
        means: defaultdict[str, float] = defaultdict(float)
        for terms, sums in self._sums.items():
            adapters = {adapter for _, adapter, _ in terms[1:]}
            for term, value in zip(terms, (reduce(sums) / steps).tolist(), strict=True):
                if len(term) == 1:
                    means[term[0]] += value
                    continue
                layer, adapter, name = term
                means[f"elbo/{name}"] += value
                if per_layer:
                    means[f"elbo/{layer if len(adapters) == 1 else f'{layer}.{adapter}'}/{name}"] += value
        self.clear()
        return dict(means)

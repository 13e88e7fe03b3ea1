"""Cases of a plain function of tensors: inputs from a layer's output size, the truth from stock torch in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._case import Case, Problem, Run, Unavailable, choose, generator, gradients, place, safe_gradient
from .._shapes import Layer, distinct, layers

Tensors = Mapping[str, Tensor]


class Function:
    """An op of ``bench`` and ``info`` made of four functions; has what a file of ``benchmark/ops`` has.

    Args:
        inputs: ``inputs(case, g)`` -> named CPU tensors in the case's dtype.
        stock: ``stock(**tensors)`` -> a tensor or several, by stock torch operations that also run in fp64: the baseline and
            the truth.
        ours: ``ours(backend, **tensors)`` -> the same by our function.
        outputs: names of what both return.
        wrt: names of the inputs that want a gradient in ``fwd+bwd``; empty: the op is measured forward only.
        kinks: the activation whose kinks the gradient must avoid, or "none".
        traffic: ``traffic(bytes of all inputs, bytes of all outputs)`` -> least bytes of a forward pass.
    """

    STOCK = ("eager", "eager_cl", "compile")

    def __init__(
        self,
        default: str,
        inputs: Callable[[Case, torch.Generator], dict[str, Tensor]],
        stock: Callable[..., Any],
        ours: Callable[..., Any],
        outputs: tuple[str, ...] = ("out",),
        wrt: tuple[str, ...] = (),
        kinks: str = "none",
        traffic: Callable[[int, int], int] = lambda read, written: read + written,
    ) -> None:
        self.DEFAULT, self._inputs, self._stock, self._ours = default, inputs, stock, ours
        self._outputs, self._wrt, self._kinks, self._traffic = outputs, wrt, kinks, traffic
        self.problem = lru_cache(maxsize=1)(self._problem)

    @property
    def differentiable(self) -> bool:
        """Whether ``fwd+bwd`` exists."""
        return bool(self._wrt)

    def select(self, selection: str) -> list[Layer]:
        """One layer of each output size."""
        return distinct(layers(selection), lambda layer: (layer.C_out, layer.H_out, layer.W_out))

    def _named(self, results: Any) -> dict[str, Tensor]:
        values = results if isinstance(results, tuple) else (results,)
        return dict(zip(self._outputs, values, strict=True))

    def _problem(self, case: Case) -> Problem:
        if case.backward and not self._wrt:
            raise Unavailable(f"{case.op} is measured forward only: use --pass fwd")
        g = generator(case)
        made = self._inputs(case, g)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in made.items()}
        leaves = {name: t.detach().requires_grad_(case.backward and name in self._wrt) for name, t in wide.items()}
        found = self._named(self._stock(**leaves))
        truth, dout = {name: t.detach() for name, t in found.items()}, None
        if case.backward:
            last = found[self._outputs[-1]]
            dout = safe_gradient(case, g, last.detach(), self._kinks)
            grads = torch.autograd.grad(last, [leaves[name] for name in self._wrt], dout.double())
            truth |= {f"d{name}": grad for name, grad in zip(self._wrt, grads, strict=True)}
        return Problem(made, truth, dout)

    def setup(self, case: Case, provider: str) -> Run:
        """The call of one provider, with inputs of its own."""
        made = self.problem(case)
        t: dict[str, Tensor] = {name: place(case, value, provider) for name, value in made.inputs.items()}
        call = choose(provider, lambda: self._stock(**t), None, lambda backend: self._ours(backend, **t))
        read = sum(x.numel() * x.element_size() for x in made.inputs.values())
        item = torch.finfo(case.torch_dtype).bits // 8
        written = sum(
            made.truth[name].numel() * (item if made.truth[name].is_floating_point() else made.truth[name].element_size())
            for name in self._outputs
        )
        traffic = self._traffic(read, written)
        if not case.backward:
            return Run(call, lambda: self._named(call()), traffic)
        names = [self._outputs[-1], *(f"d{name}" for name in self._wrt)]

        def last() -> Tensor:
            results = call()
            return results[-1] if isinstance(results, tuple) else results

        step = gradients(last, [t[name].requires_grad_() for name in self._wrt], place(case, made.dout, provider))
        first = self._outputs[:-1]

        def outputs() -> dict[str, Tensor]:
            found = dict(zip(names, step(), strict=True))
            return found | (dict(zip(first, call()[:-1], strict=True)) if first else {})

        return Run(step, outputs, 2 * traffic)

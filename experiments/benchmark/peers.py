"""PyTorch contenders: `python -m experiments.benchmark.peers NAME THREADS SIZE`, of the benchmark.

Those of a library are written as its own Omniglot example is, except that the gradient of a task is
taken before the next task starts, which needs less memory. The others are eager loops by
`torch.func.functional_call`, with images and weights in `channels_last`. What is timed pads images
of even size as PyTorch does, on all sides; the check in float64 pads them as JAX does, which costs
one copy. learn2learn, which the field also uses, does not build on Python 3.11 or newer.
"""
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false

import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from experiments.benchmark import workload


def meta_gradient(name: str, size: workload.Size = workload.REFERENCE) -> workload.Program:
    """The meta-gradient averaged over tasks, one task after another, on all threads."""
    is_loop = name in _LOOPS

    def make_run(exact: bool) -> Callable[[Any], list[Any]]:
        import torch

        net = _network(workload.params(size), size, exact)
        net = net.double() if exact else net
        net = net.to(memory_format=torch.channels_last) if is_loop else net
        query_loss = QUERY_LOSSES[name](net, size)

        def run(inputs):
            net.zero_grad()
            for task in zip(*inputs, strict=True):
                (query_loss(*task) / len(inputs[0])).backward()
            return [parameter.grad.detach() for parameter in net.parameters()]

        return run

    timed = make_run(exact=False)

    def run(inputs):
        timed(inputs)
        return {}

    def gradients(tasks):
        return _to_jax(make_run(exact=True)(_tensors(tasks, exact=True, channels_last=is_loop)))

    prepare = partial(_tensors, exact=False, channels_last=is_loop)
    return workload.Program(prepare, run, gradients)


def _tensors(tasks: workload.Tasks, *, exact: bool, channels_last: bool) -> list[Any]:
    """Support images and labels, query images and labels; images `[tasks, n, channels, ...]`."""
    import torch

    tensors, dtype = [], torch.float64 if exact else torch.float32
    for images, labels in tasks:
        images = torch.tensor(images, dtype=dtype).movedim(-1, 2)
        images = images if channels_last else images.contiguous()
        tensors += [images, torch.tensor(labels).long()]
    return tensors


def _to_jax(gradients: list[Any]) -> dict[str, np.ndarray]:
    """Gradients by JAX's parameter paths and in its layout."""
    arrays = [gradient.numpy() for gradient in gradients]
    named = {}
    for i in range(4):
        named[f"block_{i}/kernel"] = arrays[3 * i].transpose(2, 3, 1, 0)
        named[f"block_{i}/scale"], named[f"block_{i}/offset"] = arrays[3 * i + 1 : 3 * i + 3]
    ways, filters = len(arrays[12]), len(arrays[1])
    side = math.isqrt(arrays[12].shape[1] // filters)
    head = arrays[12].reshape(ways, filters, side, side).transpose(2, 3, 1, 0)
    return named | {"head/kernel": head.reshape(-1, ways), "head/bias": arrays[13]}


def _network(params: dict[str, np.ndarray], size: workload.Size, exact: bool):
    """`imaml_jax.networks.conv4`; exactly with JAX's padding, or PyTorch's own, which is faster."""
    import torch
    from torch import nn

    layers, side, channels = [], size.side, size.channels
    for i in range(4):
        kernel = params[f"block_{i}/kernel"].transpose(3, 2, 0, 1)
        symmetric = size.pools or bool(side % 2) or not exact
        stride = 1 if size.pools else 2
        conv = nn.Conv2d(channels, len(kernel), 3, stride, padding=int(symmetric), bias=False)
        norm = nn.BatchNorm2d(len(kernel), eps=workload.EPSILON, track_running_stats=False)
        conv.weight.data = torch.tensor(kernel)
        norm.weight.data = torch.tensor(params[f"block_{i}/scale"])
        norm.bias.data = torch.tensor(params[f"block_{i}/offset"])
        layers += [*([] if symmetric else [nn.ZeroPad2d((0, 1, 0, 1))]), conv, norm, nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if size.pools else []
        side, channels = side // 2 if size.pools else -(-side // 2), len(kernel)
    kernel = params["head/kernel"]
    head = nn.Linear(*kernel.shape)
    features = kernel.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
    head.weight.data = torch.tensor(features.reshape(len(features), -1))
    head.bias.data = torch.tensor(params["head/bias"])
    return nn.Sequential(*layers, nn.Flatten(), head)


def _torchopt_imaml(net, size, *, normal: bool):
    import torch
    import torchopt
    from torch.nn.functional import cross_entropy
    from torchopt.diff.implicit import ImplicitMetaGradientModule

    solver = torchopt.linear_solve.solve_normal_cg if normal else torchopt.linear_solve.solve_cg
    solve = solver(maxiter=workload.CG_STEPS, rtol=0.0, atol=0.0)

    class InnerNet(ImplicitMetaGradientModule, linear_solve=solve):
        def __init__(self, meta_net):
            super().__init__()
            self.meta_net = meta_net
            self.net = torchopt.module_clone(meta_net, by="deepcopy", detach_buffers=True)

        def reset_parameters(self):
            with torch.no_grad():
                for own, meta in zip(self.parameters(), self.meta_parameters(), strict=True):
                    own.data.copy_(meta.data)
                    own.detach_().requires_grad_()

        def forward(self, inputs):
            return self.net(inputs)

        def objective(self, inputs, labels):
            pairs = zip(self.parameters(), self.meta_parameters(), strict=True)
            penalty = sum(torch.sum(torch.square(own - meta)) for own, meta in pairs)
            return cross_entropy(self(inputs), labels) + 0.5 * size.reg_strength * penalty

        def solve(self, inputs, labels):
            parameters = tuple(self.parameters())
            optimizer = torchopt.SGD(parameters, lr=workload.INNER_RATE)
            with torch.enable_grad():
                for _ in range(size.implicit_steps):
                    loss = self.objective(inputs, labels)
                    optimizer.zero_grad()
                    loss.backward(inputs=parameters)
                    optimizer.step()
            return self

    inner = InnerNet(net)

    def query_loss(x, y, z, w):
        inner.reset_parameters()
        return cross_entropy(inner.solve(x, y)(z), w)

    return query_loss


def _torchopt_maml(net, size):
    import torchopt
    from torch.nn.functional import cross_entropy

    optimizer = torchopt.MetaSGD(net, lr=workload.INNER_RATE)
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    optimizer_start = torchopt.extract_state_dict(optimizer, by="reference")

    def query_loss(x, y, z, w):
        for _ in range(size.inner_steps):
            optimizer.step(cross_entropy(net(x), y))
        loss = cross_entropy(net(z), w)
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(optimizer, optimizer_start)
        return loss

    return query_loss


def _higher_maml(net, size):
    import higher
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.SGD(net.parameters(), lr=workload.INNER_RATE)

    def query_loss(x, y, z, w):
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(size.inner_steps):
                inner.step(cross_entropy(fast(x), y))
            return cross_entropy(fast(z), w)

    return query_loss


def _loop_maml(net, size, *, first_order: bool):
    import torch
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    params = dict(net.named_parameters())

    def query_loss(x, y, z, w):
        fast = _detached(params) if first_order else params
        for _ in range(size.inner_steps):
            loss = cross_entropy(functional_call(net, fast, x), y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            fast = _moved(fast, grads)
            fast = _detached(fast) if first_order else fast
        loss = cross_entropy(functional_call(net, fast, z), w)
        if not first_order:
            return loss
        return _with_gradient(params, torch.autograd.grad(loss, list(fast.values())))

    return query_loss


def _loop_imaml(net, size, *, head_only: bool):
    import torch
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    body, head = (net[:-1], net[-1]) if head_only else (torch.nn.Identity(), net)
    start = dict(head.named_parameters())

    def query_loss(x, y, z, w):
        features, fast = body(x), _detached(start)
        fixed = features.detach()
        for _ in range(size.implicit_steps):
            loss = cross_entropy(functional_call(head, fast, fixed), y)
            grads = torch.autograd.grad(loss, list(fast.values()))
            grads = [
                g + size.reg_strength * (p - p0).detach()
                for g, p, p0 in zip(grads, fast.values(), start.values(), strict=True)
            ]
            fast = _detached(_moved(fast, grads))
        solution = list(fast.values())
        loss = cross_entropy(functional_call(head, fast, body(z)), w)
        right = torch.autograd.grad(loss, solution, retain_graph=head_only)
        support_loss = cross_entropy(functional_call(head, fast, features), y)
        grads = torch.autograd.grad(support_loss, solution, create_graph=True)

        def product(v):
            hv = torch.autograd.grad(grads, solution, v, retain_graph=True)
            return [h + size.reg_strength * u for h, u in zip(hv, v, strict=True)]

        x = _conjugate_gradients(product, right)
        implicit = _with_gradient(start, [size.reg_strength * u for u in x])
        if not head_only:
            return implicit
        mixed = sum((g * u).sum() for g, u in zip(grads, x, strict=True))
        slow = list(body.parameters())
        direct = torch.autograd.grad(loss, slow)
        through = torch.autograd.grad(mixed, slow)
        total = [d - t for d, t in zip(direct, through, strict=True)]
        return implicit + _with_gradient(dict(body.named_parameters()), total)

    return query_loss


def _conjugate_gradients(product, b):
    """`CG_STEPS` from zero on lists of tensors."""

    def dot(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    def add(a, scale, b):
        return [x + scale * y for x, y in zip(a, b, strict=True)]

    x, residual, direction = [0 * v for v in b], list(b), list(b)
    square = dot(residual, residual)
    for _ in range(workload.CG_STEPS):
        image = product(direction)
        step = square / dot(direction, image)
        x, residual = add(x, step, direction), add(residual, -step, image)
        old, square = square, dot(residual, residual)
        direction = add(residual, square / old, direction)
    return x


def _moved(params, grads):
    pairs = zip(params.items(), grads, strict=True)
    return {name: p - workload.INNER_RATE * g for (name, p), g in pairs}


def _detached(params):
    """The same values, without the graph behind them."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _with_gradient(params, grads):
    """A value whose derivative in the parameters is `grads`."""
    return sum((p * g).sum() for p, g in zip(params.values(), grads, strict=True))


_LOOPS: dict[str, Callable[..., Any]] = {
    "PyTorch iMAML": partial(_loop_imaml, head_only=False),
    "PyTorch MAML": partial(_loop_maml, first_order=False),
    "PyTorch first-order MAML": partial(_loop_maml, first_order=True),
    "PyTorch implicit ANIL": partial(_loop_imaml, head_only=True),
}
QUERY_LOSSES: dict[str, Callable[..., Any]] = {
    "torchopt iMAML, solve_cg": partial(_torchopt_imaml, normal=False),
    "torchopt iMAML, solve_normal_cg": partial(_torchopt_imaml, normal=True),
    "torchopt MAML": _torchopt_maml,
    "higher MAML": _higher_maml,
    **_LOOPS,
}


if __name__ == "__main__":
    import torch

    warnings.simplefilter("ignore")  # the libraries call what PyTorch has deprecated
    torch.set_num_threads(int(sys.argv[2]))
    size = workload.SIZES[sys.argv[3]]
    workload.serve(meta_gradient(sys.argv[1], size), size)

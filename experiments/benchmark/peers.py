"""PyTorch contenders: `python -m experiments.benchmark.peers NAME THREADS`, run by the benchmark.

Each is written as its library's own Omniglot example is, except that the gradient of a task is
taken before the next task starts, which needs less memory. What is timed pads images of even size
as PyTorch does, on all sides; the check in float64 pads them as JAX does, which costs one copy.
learn2learn, which the field also uses, does not build on Python 3.11 or newer.
"""
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from experiments.benchmark import workload


def meta_gradient(name: str) -> workload.Program:
    """The meta-gradient averaged over tasks, one task after another, on all threads."""

    def make_run(exact: bool) -> Callable[[Any], list[Any]]:
        net = _network(workload.params(), exact)
        net = net.double() if exact else net
        query_loss = _QUERY_LOSSES[name](net)

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
        return _to_jax(make_run(exact=True)(_tensors(tasks, exact=True)))

    return workload.Program(partial(_tensors, exact=False), run, gradients)


def _tensors(tasks: workload.Tasks, exact: bool) -> list[Any]:
    """Support images and labels, query images and labels; images `[tasks, n, 1, 28, 28]`."""
    import torch

    tensors, dtype = [], torch.float64 if exact else torch.float32
    for images, labels in tasks:
        channels_first = np.ascontiguousarray(np.moveaxis(images, -1, 2))
        tensors += [torch.tensor(channels_first, dtype=dtype), torch.tensor(labels).long()]
    return tensors


def _to_jax(gradients: list[Any]) -> dict[str, np.ndarray]:
    """Gradients by JAX's parameter paths and in its layout."""
    arrays = [gradient.numpy() for gradient in gradients]
    named = {}
    for i in range(4):
        named[f"block_{i}/kernel"] = arrays[3 * i].transpose(2, 3, 1, 0)
        named[f"block_{i}/scale"], named[f"block_{i}/offset"] = arrays[3 * i + 1 : 3 * i + 3]
    ways = arrays[12].shape[0]
    head = arrays[12].reshape(ways, workload.FILTERS, 2, 2).transpose(2, 3, 1, 0)
    return named | {"head/kernel": head.reshape(-1, ways), "head/bias": arrays[13]}


def _network(params: dict[str, np.ndarray], exact: bool):
    """`imaml_jax.networks.conv4`; exactly with JAX's padding, or PyTorch's own, which is faster."""
    import torch
    from torch import nn

    layers, side, channels = [], workload.SIDE, 1
    for i in range(4):
        kernel = params[f"block_{i}/kernel"].transpose(3, 2, 0, 1)
        symmetric = bool(side % 2) or not exact
        conv = nn.Conv2d(channels, len(kernel), 3, 2, padding=int(symmetric), bias=False)
        norm = nn.BatchNorm2d(len(kernel), eps=workload.EPSILON, track_running_stats=False)
        conv.weight.data = torch.tensor(kernel)
        norm.weight.data = torch.tensor(params[f"block_{i}/scale"])
        norm.bias.data = torch.tensor(params[f"block_{i}/offset"])
        layers += [*([] if symmetric else [nn.ZeroPad2d((0, 1, 0, 1))]), conv, norm, nn.ReLU()]
        side, channels = -(-side // 2), len(kernel)
    kernel = params["head/kernel"]
    head = nn.Linear(*kernel.shape)
    features = kernel.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
    head.weight.data = torch.tensor(features.reshape(len(features), -1))
    head.bias.data = torch.tensor(params["head/bias"])
    return nn.Sequential(*layers, nn.Flatten(), head)


def _torchopt_imaml(net, *, normal: bool):
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
            return cross_entropy(self(inputs), labels) + 0.5 * workload.REG_STRENGTH * penalty

        def solve(self, inputs, labels):
            parameters = tuple(self.parameters())
            optimizer = torchopt.SGD(parameters, lr=workload.INNER_RATE)
            with torch.enable_grad():
                for _ in range(workload.INNER_STEPS):
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


def _torchopt_maml(net):
    import torchopt
    from torch.nn.functional import cross_entropy

    optimizer = torchopt.MetaSGD(net, lr=workload.INNER_RATE)
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    optimizer_start = torchopt.extract_state_dict(optimizer, by="reference")

    def query_loss(x, y, z, w):
        for _ in range(workload.INNER_STEPS):
            optimizer.step(cross_entropy(net(x), y))
        loss = cross_entropy(net(z), w)
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(optimizer, optimizer_start)
        return loss

    return query_loss


def _higher_maml(net):
    import higher
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.SGD(net.parameters(), lr=workload.INNER_RATE)

    def query_loss(x, y, z, w):
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(workload.INNER_STEPS):
                inner.step(cross_entropy(fast(x), y))
            return cross_entropy(fast(z), w)

    return query_loss


_QUERY_LOSSES: dict[str, Callable[..., Any]] = {
    "torchopt iMAML, solve_cg": partial(_torchopt_imaml, normal=False),
    "torchopt iMAML, solve_normal_cg": partial(_torchopt_imaml, normal=True),
    "torchopt MAML": _torchopt_maml,
    "higher MAML": _higher_maml,
}


if __name__ == "__main__":
    import torch

    warnings.simplefilter("ignore")  # the libraries call what PyTorch has deprecated
    torch.set_num_threads(int(sys.argv[2]))
    workload.serve(meta_gradient(sys.argv[1]))

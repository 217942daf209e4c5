"""What measuring costs: health at the default cadence, and oscillation at every step, as a share of the time of a step.

Steps, measurements and the work of the techniques are timed in turn, in one process, and the medians compared: the
differences are far smaller than what two runs of a Trainer differ by. Data are random. Usage:
python benchmarks/health_cost.py [--rounds 15] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import publish
from torch import Tensor, nn

from lightning_qat.callbacks.health import HealthMonitor
from lightning_qat.nn import prepare, weight_fake_quants
from lightning_qat.nn.oscillation import OscillationState, current_codes, dampening_gradient, hold_frozen, holds_values
from lightning_qat.tasks.cifar_resnet import CifarResNet
from lightning_qat.tasks.tiny_lm import TinyLM

EVERY_N_STEPS = 50
"""The Trainer's default of ``log_every_n_steps``."""


def language_model(dim: int, num_layers: int, num_sequences: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return a language model and its loss on ``num_sequences`` of 128 tokens."""
    tokens = torch.randint(256, (num_sequences, 129))
    model = TinyLM(256, dim, num_layers, num_heads=dim // 16, ffn_dim=3 * dim)
    return model, lambda net: F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def resnet() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return a ResNet-20 and its loss on 128 images."""
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    return CifarResNet(), lambda net: F.cross_entropy(net(images), labels)


def wide(num_tokens: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return four layers of 4M weights each, and a loss on so few tokens that weights are all that costs."""
    x = torch.randn(num_tokens, 2048)
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
    return model, lambda net: net(x).square().mean()


MODELS = {
    "language model, 0.2M weights, 16 x 128 tokens": lambda: language_model(64, 4, 16),
    "language model, 13M weights, 4 x 128 tokens": lambda: language_model(384, 8, 4),
    "ResNet-20, 0.3M weights, 128 images": resnet,
    "4 layers, 17M weights, 32 tokens": lambda: wide(32),
}


def work_of(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Mapping[str, Callable[[], None]]:
    """Return what is timed, by name."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    monitor = HealthMonitor()
    layers = [layer for _, layer in weight_fake_quants(model)]
    states = {
        can_freeze: [OscillationState.begin(current_codes(layer), can_freeze) for layer in layers]
        for can_freeze in (False, True)
    }

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    def health() -> None:
        monitor.see_gradients(model)
        monitor.measure(model)

    @torch.no_grad()
    def measure() -> None:
        for layer, state in zip(layers, states[False], strict=True):
            state.update(current_codes(layer), 0.01)

    @torch.no_grad()
    def freeze() -> None:
        for layer, state in zip(layers, states[True], strict=True):
            state.update(current_codes(layer), 0.01)
            quantizer, matrix = layer.weight_fake_quant, layer.to_matrix(layer.weight)
            params = quantizer.qparams(matrix) if holds_values(layer) else None
            state.freeze(0.02, params, quantizer.rung_scheme)
            hold_frozen(layer, state)

    @torch.no_grad()
    def dampen() -> None:
        for layer in layers:
            quantizer, matrix = layer.weight_fake_quant, layer.to_matrix(layer.weight)
            gradient = dampening_gradient(matrix, quantizer.qparams(matrix), quantizer.rung_scheme)
            layer.weight.grad.add_(layer.from_matrix(gradient, layer.weight), alpha=0.0)

    return {"step": step, "health": health, "measure": measure, "freeze": freeze, "dampen": dampen}


def time_in_turn(work: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median time of each in seconds, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, do in work.items():
            began = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def main() -> None:
    """Time every model with learned and with observed scales, print the shares and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "health_cost")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for title, make in MODELS.items():
        for scales, learn_scales in (("observed", False), ("learned", True)):
            model, loss = make()
            prepare(model, "w4", learn_scales=learn_scales)
            seconds = time_in_turn(work_of(model, loss), arguments.rounds)
            step = seconds.pop("step")
            shares = [f"{seconds['health'] / step / EVERY_N_STEPS:.2%}"]
            shares += [f"{seconds[name] / step:.1%}" for name in ("measure", "freeze", "dampen")]
            rows.append(f"| {title} | {scales} | {step * 1e3:.1f} ms | {' | '.join(shares)} |")
            print(rows[-1], flush=True)
    lines = [
        "# What measuring costs",
        "",
        f"`python benchmarks/health_cost.py --rounds {arguments.rounds}`: time as a share of that of a training step",
        f"(forward, backward, AdamW; 4 bits per channel; {torch.get_num_threads()} threads). Health is measured at",
        f"every {EVERY_N_STEPS}th step, the Trainer's default; the other columns are the work of `oscillation=` at",
        "every step: measuring; measuring and freezing; and what dampening adds.",
        "",
        "| model | scales | step | health | oscillation | and freezing | dampening |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    publish(arguments.out, lines)


if __name__ == "__main__":
    main()

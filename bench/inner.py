"""The inner loop's speed against a bare PyTorch loop of the same model, adapter and batch.

    python -m bench.inner [--quick] [--json FILE]

The bare loop is what one would write by hand: AdamW over the parameters, `clip_grad_norm_`, `zero_grad`, the loss
read once a step. Both train the embedded default recipe, by turns in one process; ours takes snapshots as well.
The other loops compare the adapters: peft's own DoRA, ours with the norm of the frozen weight kept, the linear form of
DoRA, and LoRA.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from bench.harness import Claim, arguments, at_least, interleaved, ratio_of_medians, report, table
from hivetrain.model import assemble, attach_adapter, load_base
from hivetrain.model.dora import FactoredDora
from hivetrain.run import Recipe
from hivetrain.training import InnerLoop, genesis_state

GOAL = 0.97


def fixed_batches(recipe: Recipe, device: str) -> Callable[[int], Tensor]:
    """Random token ids, drawn before anything is timed: the loader is not what is measured."""
    data = recipe.data
    shape = (recipe.inner.max_steps, data.accumulation, data.batch_size, data.seq_len)
    ids = torch.randint(0, recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda step: ids[step]


def our_loop(recipe: Recipe, device: str, num_steps: int) -> Callable[[], float]:
    """Tokens per second of `InnerLoop`, over a whole round with its snapshots."""
    model = assemble(recipe, None, recipe.model.vocab_size, device)
    loop = InnerLoop(model.module, model.flat, recipe, device)
    state, batches = genesis_state(model.flat, model.base_sha256), fixed_batches(recipe, device)

    def case() -> float:
        work = loop.run(state, batches, num_steps=num_steps)
        return work.num_tokens / work.seconds

    return case


def bare_loop(recipe: Recipe, device: str, num_steps: int, *, peft_dora: bool = False) -> Callable[[], float]:
    """Tokens per second of a loop written by hand."""
    base = load_base(recipe.model, None, recipe.model.vocab_size)
    model = attach_adapter(base, recipe.adapter, 0).to(device)
    if peft_dora:
        _put_back_peft_dora(model)
    batches, inner = fixed_batches(recipe, device), recipe.inner
    parameters = [p for p in model.parameters() if p.requires_grad]

    def case() -> float:
        optimizer = torch.optim.AdamW(
            parameters, lr=inner.lr, betas=(inner.beta1, inner.beta2), weight_decay=inner.weight_decay
        )
        started, num_tokens, losses = time.perf_counter(), 0, []
        for step in range(num_steps):
            ids = batches(step)
            optimizer.zero_grad()
            for micro in ids:
                loss = model(input_ids=micro, labels=micro).loss / len(ids)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, inner.clip_norm)
            optimizer.step()
            losses.append(loss.item())
            num_tokens += ids.numel()
        return num_tokens / (time.perf_counter() - started)

    return case


def _put_back_peft_dora(model: nn.Module) -> None:
    from peft.tuners.lora.dora import DoraLinearLayer

    for module in list(model.modules()):
        layers = getattr(module, "lora_magnitude_vector", {})
        for name, layer in list(layers.items()):
            if isinstance(layer, FactoredDora):
                layers[name] = DoraLinearLayer(layer.fan_in_fan_out)
                layers[name].weight = layer.weight


def with_adapter(recipe: Recipe, kind: Literal["dora", "dora_linear", "lora"]) -> Recipe:
    """The recipe with another kind of adapter."""
    return dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, kind=kind))


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    # One thread: on a machine that does other work too, the second one mostly waits, and the ratio becomes noise.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe()
    num_steps, repeats = (10, 7) if options.quick else (recipe.inner.max_steps, 15)
    results = interleaved(
        {
            "ours": our_loop(recipe, device, num_steps),
            "bare": bare_loop(recipe, device, num_steps),
            "bare, peft's own DoRA": bare_loop(recipe, device, num_steps, peft_dora=True),
            "bare, linear DoRA": bare_loop(with_adapter(recipe, "dora_linear"), device, num_steps),
            "bare, LoRA": bare_loop(with_adapter(recipe, "lora"), device, num_steps),
        },
        repeats,
    )
    rows = [
        [name, f"{statistics.median(rates):,.0f}", f"{ratio_of_medians(rates, results['bare']):.3f}"]
        for name, rates in results.items()
    ]
    table(f"Inner loop on {device}, medians of {repeats}", ("loop", "tokens/s", "over bare"), rows)
    claims: list[Claim] = [
        at_least(
            "inner loop over a bare PyTorch loop, tokens/s", ratio_of_medians(results["ours"], results["bare"]), GOAL
        ),
        at_least(
            "factored DoRA over peft's DoRA, tokens/s",
            ratio_of_medians(results["bare"], results["bare, peft's own DoRA"]),
            1.0,
        ),
        at_least(
            "linear DoRA over factored DoRA, tokens/s",
            ratio_of_medians(results["bare, linear DoRA"], results["bare"]),
            1.0,
        ),
    ]
    return report(claims, options.json)


if __name__ == "__main__":
    raise SystemExit(main())

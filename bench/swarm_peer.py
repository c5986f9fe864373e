"""One peer of `bench.swarm`: a Trainer with stock `hivemind.Optimizer`, or SwarmTrainer, of the same settings."""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from typing import Any

VOCABULARY, LENGTH, BATCH = 256, 32, 4

# What the optimizer does on the training thread: whose calls they are.
PHASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "adding up gradients": ("", ("_check_and_accumulate_gradients",)),
    "looking for a group": ("", ("_maybe_schedule_gradient_averaging", "_maybe_schedule_state_averaging")),
    "averaging gradients": ("", ("_begin_averaging_gradients", "_average_gradients_and_load_into_optimizer")),
    "step and averaging state": ("state_averager", ("step",)),
}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = json.loads(sys.argv[1])
    trainer = stock(options) if options["stock"] else ours(options)
    timer = Timer(options)
    trainer.add_callback(timer.callback(trainer))
    trainer.train()
    if options["stock"]:
        trainer.optimizer.optimizer.shutdown()
    print("RESULT " + json.dumps(timer.result()), flush=True)


class Timer:
    """How long training waits inside the optimizer's step, while both peers are there: neither joins nor leaves."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._began = self._blocked = self._ended = 0.0
        self._first = self._last = self._steps = self._counted = 0
        self._over = False
        self._phases = dict.fromkeys(PHASES, 0.0)

    def result(self) -> dict[str, Any]:
        wall_s, rounds = self._ended - self._began, self._last - self._first
        return {"wall_s": wall_s, "blocked_s": self._blocked, "rounds": rounds, "phases": self._phases,
                "samples": BATCH * self._counted}  # fmt: skip

    def watch(self, swarm: Any) -> None:
        """Time what the optimizer calls on the training thread."""
        for name, (owner, calls) in PHASES.items():
            place = getattr(swarm, owner) if owner else swarm
            for call in calls:
                setattr(place, call, self._timed(name, getattr(place, call)))

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                if self._began and not self._over and threading.current_thread() is threading.main_thread():
                    self._phases[name] += time.perf_counter() - began

        return timed

    def callback(self, trainer: Any) -> Any:
        from transformers import TrainerCallback

        timer, options = self, self._options

        class Measure(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                time.sleep(options["pace_s"])  # stands for a GPU's work: two peers share two cores here

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                timer.watch(trainer.optimizer.optimizer)

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                self.entered = time.perf_counter()

            def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                now, swarm = time.perf_counter(), trainer.optimizer.optimizer
                epoch = swarm.local_epoch
                if timer._began and not timer._over:
                    timer._blocked += now - self.entered
                    timer._steps += 1
                    if epoch > timer._last:  # the samples of whole rounds
                        timer._counted = timer._steps
                    timer._ended, timer._last = now, epoch
                    timer._over = epoch >= options["epochs"] - 1
                elif not timer._began and epoch >= 2 and swarm.tracker.global_progress.num_peers == 2:
                    timer._began, timer._first, timer._last = now, epoch, epoch

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if trainer.optimizer.optimizer.local_epoch >= options["epochs"]:
                    control.should_training_stop = True

        return Measure()


def shared(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": options["out"], "per_device_train_batch_size": BATCH, "max_steps": 5000, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip


def build(width: int) -> tuple[Any, list[dict[str, Any]]]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    draws = torch.randint(0, VOCABULARY, (512, LENGTH), generator=torch.Generator().manual_seed(0))
    return GPT2LMHeadModel(config), [{"input_ids": row, "labels": row} for row in draws]


def ours(options: dict[str, Any]) -> Any:
    from hivetrain import SwarmArguments, SwarmTrainer

    model, data = build(options["width"])
    opt = {"run_id": "bench", "target_batch_size": options["target"], **options["times"]}
    config = {"dht": {"initial_peers": options["peers"]}, "opt": opt}
    args = SwarmArguments(**shared(options), hivemind_config=config, swarm_epochs=options["epochs"])
    return SwarmTrainer(model=model, train_dataset=data, args=args)


def stock(options: dict[str, Any]) -> Any:
    """hivemind's own recipe for a Trainer: its optimizer with its defaults, and a scheduler that does nothing.

    Its averagers warn that matchmaking can deadlock where a request may take as long as all of it: so may none here.
    """
    import hivemind
    import torch
    from transformers import Trainer, TrainingArguments

    class Idle(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self, epoch: Any = None) -> None:
            pass

        def get_last_lr(self) -> list[Any]:
            return [1e-3]

    model, data = build(options["width"])
    dht = hivemind.DHT(initial_peers=options["peers"], start=True)
    optimizer = hivemind.Optimizer(
        dht=dht, run_id="bench", target_batch_size=options["target"], batch_size_per_step=BATCH,
        params=list(model.parameters()), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        scheduler=lambda inner: torch.optim.lr_scheduler.ConstantLR(inner, factor=1.0), **options["times"],
        averager_opts={"request_timeout": options["times"]["matchmaking_time"] / 2},
    )  # fmt: skip
    print(f"To join the training, use initial_peers = {[str(maddr) for maddr in dht.get_visible_maddrs()]}", flush=True)
    args = TrainingArguments(**shared(options))
    return Trainer(model=model, train_dataset=data, args=args, optimizers=(optimizer, Idle(optimizer)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    import os

    os._exit(0)  # a stock process hangs at its exit

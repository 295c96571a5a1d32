"""Entry points of the embedded CPU run: train, evaluate, predict; each does what its rank has to do.

One rank needs no launcher; several are started by msrun, whose scheduler copy calls `run_scheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import mindspore
import numpy as np
from mindspore import Tensor, ops

from transform_ckpt.embedded.collectives import Array, Ranks, start
from transform_ckpt.embedded.config import EmbeddedConfig
from transform_ckpt.embedded.data import Samples, Tokenizer, read_samples
from transform_ckpt.embedded.layout import STEP, Slice, check_world, parameter_shapes, slices
from transform_ckpt.embedded.network import LlamaForCausalLM, Weights
from transform_ckpt.embedded.optimizer import AdamW
from transform_ckpt.embedded.state import Loader, Report, Saver, first_values, load_into, zeros
from transform_ckpt.errors import InputError

__all__ = ["Loader", "Prediction", "evaluate", "parameter_shapes", "predict", "run_scheduler", "train", "unloaded"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """For each prompt: its ids with the new ones, the new ones as text, and float32 logits [prompt, vocabulary]."""

    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    logits: tuple[Array, ...]


@dataclass(frozen=True)
class _Job:
    """One rank with its network."""

    config: EmbeddedConfig
    ranks: Ranks
    slices: dict[str, Slice]
    network: LlamaForCausalLM

    @classmethod
    def start(cls, config: EmbeddedConfig, rank: int, world: int, *, drawn: bool) -> _Job:
        """`drawn`: weights from the seed; else zeros, which a checkpoint replaces."""
        check_world(config, rank, world)
        held = slices(config, rank)
        ranks = start(config, rank)
        network = LlamaForCausalLM(Weights(held, ranks, first_values(config) if drawn else zeros), config)
        return cls(config, ranks, held, network)

    def load_weights(self, load: Loader, report: Report) -> None:
        load_into(self.network, self.network.trainable_params(), load, self.config.where, report)

    def batch(self, samples: Samples, step: int) -> tuple[Tensor, Tensor]:
        inputs, labels = samples.batch(step, self.ranks.dp_index)
        return Tensor(inputs), Tensor(labels)


# ------------------------------------------------------------------------------------------------ training


def train(
    config: EmbeddedConfig,
    rank: int,
    world: int,
    output_dir: str,
    load: Loader | None,
    *,
    resume: bool,
    report: Report = print,
) -> list[float]:
    """The losses of the steps that were done, each the mean over the global batch.

    `load` gives the weights; with `resume` also optimizer states and global_step, after which the run goes on.
    """
    samples = read_samples(config)
    job = _Job.start(config, rank, world, drawn=load is None)
    optimizer = AdamW(job.network.trainable_params(), config.optimizer)
    if load is not None and resume:
        everything = mindspore.nn.CellList([job.network, optimizer], auto_prefix=False)
        wanted = [*job.network.trainable_params(), *optimizer.states]
        load_into(everything, wanted, load, config.where, report)
    elif load is not None:
        job.load_weights(load, report)
    elif resume:
        raise InputError(f"{config.where}: there is nothing to resume from; give load_checkpoint, or do not resume")
    return _steps(job, optimizer, samples, _saver(config, output_dir, rank, report), report)


def unloaded(config: EmbeddedConfig, rank: int, names: Collection[str]) -> dict[str, Array]:
    """What some of this rank's parameters hold when nothing is loaded: weights from the seed, states of zero."""
    draw, held = first_values(config), slices(config, rank)
    wanted = parameter_shapes(config, rank, config.dp * config.mp, optimizer=True)
    kinds = {STEP: np.int32}
    return {
        name: draw(held[name]) if name in held else np.zeros(wanted[name], kinds.get(name, np.float32))
        for name in names
    }


def _saver(config: EmbeddedConfig, output_dir: str, rank: int, report: Report) -> Saver | None:
    return None if config.saving is None else Saver(config.saving, output_dir, rank, report)


def _steps(job: _Job, optimizer: AdamW, samples: Samples, saver: Saver | None, report: Report) -> list[float]:
    gradients = mindspore.value_and_grad(_loss_of(job.network), None, job.network.trainable_params())
    average = _Average(job)
    losses: list[float] = []
    first, last = optimizer.steps, samples.steps
    if first >= last:
        report(f"nothing to do: step {first} of {last} is done")
    for step in range(first, last):
        loss, found = average(*gradients(*job.batch(samples, step)))
        optimizer(found, job.config.optimizer.schedule.rate(step, last))
        losses.append(loss)
        report(f"step {step + 1}/{last} loss {loss:.6f}")
        if saver is not None and ((step + 1) % saver.saving.every == 0 or step + 1 == last):
            _save(job, optimizer, saver, samples.steps_per_epoch)
    return losses


def _loss_of(network: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return network(inputs, labels)

    return loss


class _Average:
    """Means over the data-parallel ranks, in one sum; then the clipping of what belongs to one vector."""

    def __init__(self, job: _Job) -> None:
        self.ranks = job.ranks
        self.held = [job.slices[parameter.name] for parameter in job.network.trainable_params()]
        self.clip_norm = job.config.optimizer.clip_norm

    def __call__(self, loss: Tensor, gradients: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        size = self.ranks.dp.size
        found = list(gradients)
        if size > 1:
            shared = [number for number, held in enumerate(self.held) if held.parts == 1]
            flat = ops.concat([loss.reshape((1,)), *(found[number].reshape((-1,)) for number in shared)])
            flat = self.ranks.dp.sum(flat) / size
            loss, start = flat[0], 1
            for number in shared:
                shape = self.held[number].shape
                stop = start + int(np.prod(shape))
                found[number] = flat[start:stop].reshape(shape)
                start = stop
            found = [value if held.parts == 1 else value / size for value, held in zip(found, self.held, strict=True)]
        return float(loss.asnumpy()), self._clipped(found)

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        """Scaled to `clip_norm` when the norm over all ranks is larger; a slice of several ranks counts once."""
        if self.clip_norm is None:
            return gradients
        squares = [(value * value).sum() / held.copies for value, held in zip(gradients, self.held, strict=True)]
        norm = float(self.ranks.world.sum(ops.stack(squares)).sum().sqrt().asnumpy())
        return gradients if norm <= self.clip_norm else [value * (self.clip_norm / norm) for value in gradients]


def _save(job: _Job, optimizer: AdamW, saver: Saver, steps_per_epoch: int) -> None:
    step = optimizer.steps
    epoch, of_epoch = (step - 1) // steps_per_epoch + 1, (step - 1) % steps_per_epoch + 1
    counters = {
        "epoch_num": epoch,
        "step_num": step,
        STEP: optimizer.global_step,
        "loss_scale": 1,
        "global_batch_size": job.config.global_batch_size,
    }
    saver.save([*job.network.trainable_params(), *optimizer.states], counters, epoch, of_epoch)


# ------------------------------------------------------------------------------------------------ without training


def evaluate(config: EmbeddedConfig, rank: int, world: int, load: Loader | None, *, report: Report = print) -> float:
    """The mean loss over one epoch, at most max_steps steps."""
    samples = read_samples(config, evaluation=True)
    job = _Job.start(config, rank, world, drawn=load is None)
    if load is not None:
        job.load_weights(load, report)
    steps = min(samples.steps_per_epoch, samples.steps)
    losses = [float(job.network(*job.batch(samples, step)).asnumpy()) for step in range(steps)]
    total = job.ranks.dp.sum(Tensor([float(np.mean(losses))], mindspore.float32)) / job.ranks.dp.size
    mean = float(total.asnumpy()[0])
    report(f"evaluated {steps} steps, loss {mean:.4f}")
    return mean


def predict(
    config: EmbeddedConfig,
    rank: int,
    world: int,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    load: Loader | None,
    *,
    max_new_tokens: int = 16,
    report: Report = print,
) -> Prediction:
    """The most likely continuation of each prompt, up to seq_length; every rank has the same answer."""
    tokenizer = Tokenizer(config)
    asked = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    _check_prompts(config, asked)
    job = _Job.start(config, rank, world, drawn=load is None)
    if load is not None:
        job.load_weights(load, report)
    ids, logits, texts = [], [], []
    for number, prompt in enumerate(asked):
        first, continued = _continue(job, prompt, max_new_tokens)
        ids.append(tuple(continued))
        texts.append(tokenizer.decode(continued[len(prompt) :]))
        logits.append(first)
        report(f"prompt {number + 1}/{len(asked)}: {len(continued) - len(prompt)} new tokens: {texts[-1]!r}")
    return Prediction(tuple(ids), tuple(texts), tuple(logits))


def _check_prompts(config: EmbeddedConfig, prompts: Sequence[Sequence[int]]) -> None:
    for number, prompt in enumerate(prompts):
        outside = [token for token in prompt if not 0 <= token < config.model.vocab]
        if outside:
            raise InputError(f"prompt {number}: token {outside[0]} is not one of vocab_size {config.model.vocab}")
        if not 0 < len(prompt) <= config.seq_length:
            raise InputError(f"prompt {number}: {len(prompt)} tokens; expected 1 to seq_length {config.seq_length}")


def _continue(job: _Job, prompt: list[int], new: int) -> tuple[Array, list[int]]:
    """(logits of the prompt, prompt and continuation)."""
    ids = list(prompt)
    first = latest = job.network.all_logits(Tensor([ids], mindspore.int32)).asnumpy()
    for _ in range(min(new, job.config.seq_length - len(prompt))):
        ids.append(int(latest[-1].argmax()))
        if ids[-1] == job.config.eos:
            break
        latest = job.network.all_logits(Tensor([ids], mindspore.int32)).asnumpy()
    return first, ids


def run_scheduler() -> None:
    """What msrun's scheduler copy does: bring the workers together and wait until they are gone; it trains nothing."""
    mindspore.set_device("CPU")
    mindspore.communication.init()

"""Several seeds of one configuration trained at once, as one network with stacked parameters.

One small network leaves most of a GPU idle. Here torch.func.vmap carries a dimension of seeds through the model: a
convolution becomes one grouped convolution, a pointwise operation one call for all. Each seed keeps its own initialisation,
order of digits and dropout, and its own folder: after every epoch it stands there as if it had been trained alone, to rounding.
"""

import contextlib
import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.overrides import TorchFunctionMode

from train import Diverged, Run, build_optimizer, cross_entropy


class _GivenDropout(nn.Module):
    """Dropout whose noise, zeros and 1 / (1 - p), is given: vmap could not draw it for each seed as that seed alone would."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.register_buffer("noise", noise)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.noise


class _Autocast(TorchFunctionMode):
    """What autocast does to these models, done before vmap: behind it, autocast does not know their operators any more."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.conv2d, F.linear):
            args = [arg.bfloat16() if isinstance(arg, Tensor) else arg for arg in args]
            kwargs = {name: arg.bfloat16() if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        elif func is F.batch_norm:  # of bfloat16, with statistics in float32: what vmap makes of it takes one dtype only
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


class ParallelRuns:
    """Runs that differ in nothing but the seed, trained as one and saved as `Run.train` would.

    Args:
        runs: at least one, all on the same device and after the same epoch.

    Raises:
        ValueError: for runs that do not go together.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        first = runs[0]
        if any((run.config.protocol() | {"seed": 0}, run.device, run.epoch)
               != (first.config.protocol() | {"seed": 0}, first.device, first.epoch) for run in runs):
            raise ValueError("runs in parallel must have the same configuration but for the seed, and stand after the same epoch")
        for run in runs:
            run.result["parallel_seeds"] = len(runs)
        # By name, the first dimension that of the seeds.
        self.parameters, self.buffers = stack_module_state([run.model for run in runs])
        self.model = copy.deepcopy(first.model).train()
        self.dropouts = self._give_dropouts()
        self.optimizer = build_optimizer(first.config, first.model, self.parameters)
        for name, parameter in self.parameters.items():
            states = [run.optimizer.state.get(run.model.get_parameter(name)) for run in runs]
            if states[0]:
                self.optimizer.state[parameter] = {
                    # The number of steps, one for all seeds, is no tensor of theirs.
                    key: value.clone() if value.ndim == 0 else torch.stack([state[key] for state in states])
                    for key, value in states[0].items()
                }

    def train(self, after_epoch: Callable[[], None] = lambda: None) -> None:
        """Train all to the end; `after_epoch` is called after each epoch.

        Raises:
            Diverged: after an epoch in which a loss was not finite. Runs may stand after different epochs then.
            OSError: if a folder cannot be written any more.
        """
        with contextlib.ExitStack() as reports:
            for run in self.runs:
                reports.enter_context(run.reporting())
            while not self.runs[0].finished:
                start = time.perf_counter()
                losses, wrong = self._train_epoch()
                self._unstack()
                seconds = time.perf_counter() - start
                digits = self.runs[0].steps * self.runs[0].config.batch_size
                try:
                    for run, of_run in zip(self.runs, losses):
                        run.check_finite(of_run)
                    for run, of_run, wrong_of_run in zip(self.runs, losses, wrong.tolist()):
                        # Each has its own evaluation; the time of training is that of all.
                        run.finish_epoch(of_run.mean().item(), 100 * wrong_of_run / digits, time.perf_counter() - seconds)
                except Diverged as error:
                    raise Diverged(f"seed {error.run.config.seed}: {error}", error.run) from error
                after_epoch()

    def _train_epoch(self) -> tuple[Tensor, Tensor]:
        """One pass over the training set. Returns the losses (seeds, steps) and how many digits were misclassified (seeds,)."""
        first = self.runs[0]
        config, device, steps = first.config, first.device, first.steps
        images, labels = first.training_set
        order = torch.stack([torch.randperm(len(labels), generator=run.order) for run in self.runs])
        order = order[:, :steps * config.batch_size].reshape(len(self.runs), steps, config.batch_size).to(device)
        noise = self._draw_noise()
        deformations = self._draw_deformations()
        losses = torch.zeros(len(self.runs), steps, device=device)
        wrong = torch.zeros(len(self.runs), dtype=torch.long, device=device)

        def step_of_one(parameters: dict, buffers: dict, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = functional_call(self.model, (parameters, buffers), (images,))
            return cross_entropy(logits, labels, label_smoothing=config.label_smoothing), (logits.argmax(1) != labels).sum()

        seeds = ", ".join(str(run.config.seed) for run in self.runs)
        for step in first.progress(range(steps), seeds):
            self.optimizer.zero_grad()
            first.set_learning_rate(self.optimizer, step)
            index = order[:, step]
            batch = images[index]
            if first.deform:
                batch = first.deform(batch.flatten(0, 1), deformations[:, step].flatten(0, 1)).view_as(batch)
            buffers = self.buffers | {name: values[:, step] for name, values in noise.items()}
            with _Autocast() if config.precision == "bf16" else contextlib.nullcontext():
                loss, wrong_of_step = vmap(step_of_one)(self.parameters, buffers, batch, labels[index])
            # The sum's gradient with respect to a seed's parameters is that of its own loss.
            loss.sum().backward()
            self.optimizer.step()
            losses[:, step] = loss.detach()
            wrong += wrong_of_step
        return losses, wrong

    def _draw_deformations(self) -> Tensor | None:
        """An epoch's, (seeds, steps, batch, …), as each run's own generator gives them in training alone."""
        first = self.runs[0]
        if first.deform:
            return torch.stack([
                torch.stack([run.deform.draw(run.config.batch_size, run.order) for _ in range(run.steps)]) for run in self.runs
            ])

    def _give_dropouts(self) -> dict[str, tuple[torch.Size, torch.dtype, float]]:
        """Make the model's dropouts take their noise. Returns the shape, dtype and p of each one's, by the noise's name."""
        inputs, dropouts = {}, {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Dropout)}
        run = self.runs[0]
        hooks = [module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]})) for module in dropouts.values()]
        # Its running statistics change in this: they are the copy's, and the stacked ones take their place.
        with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
            self.model(run.training_set.images[:run.config.batch_size])
        given = {}
        for (name, module), hook in zip(dropouts.items(), hooks):
            hook.remove()
            x = inputs[module]
            self.model.set_submodule(name, _GivenDropout(torch.ones_like(x)))
            given[f"{name}.noise"] = (x.shape, x.dtype, module.p)
        return given

    def _draw_noise(self) -> dict[str, Tensor]:
        """An epoch's noise, (seeds, steps, *shape), as each run's own generator gives it in training alone."""
        noise = {name: [] for name in self.dropouts}
        for run in self.runs:
            run.set_global_random_states()
            of_run = {name: [] for name in self.dropouts}
            for _ in range(run.steps):
                for name, (shape, dtype, p) in self.dropouts.items():
                    of_run[name].append(F.dropout(torch.ones(shape, dtype=dtype, device=run.device), p))
            run.random = run.global_random_states()
            for name, values in of_run.items():
                noise[name].append(torch.stack(values))
        return {name: torch.stack(values) for name, values in noise.items()}

    @torch.no_grad()
    def _unstack(self) -> None:
        """Give each run its weights, running statistics and optimizer state."""
        for i, run in enumerate(self.runs):
            run.model.load_state_dict({name: values[i] for name, values in (self.parameters | self.buffers).items()})
            for name, parameter in self.parameters.items():
                run.optimizer.state[run.model.get_parameter(name)] = {
                    key: value.clone() if value.ndim == 0 else value[i].clone() for key, value in self.optimizer.state[parameter].items()
                }

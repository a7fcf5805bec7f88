"""A scheduler of diffusers that takes the steps of one few-step student.

This file lies in the student's folder, as ``scheduler/student_scheduler.py``, where diffusers runs
it with ``trust_remote_code=True``. The steps are numbers in ``scheduler_config.json``: each state
is a sum of the last one and of the noises that the network has predicted so far, which holds for
every solver whose steps are linear. States z = x / sqrt(1 + sigma^2) are what the network sees;
what the last step returns is x, which the autoencoder decodes.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """The steps of a student; ``num_inference_steps`` must be their number, n.

    Args:
        timesteps: [n] times that the network is told, with fractions.
        sigmas: [n] noise levels of these times.
        start: What unit noise is multiplied by to be the first state.
        scales_first_input: The pipeline does not multiply its noise by ``init_noise_sigma``, as
            ``DiTPipeline`` does not; ``scale_model_input`` multiplies it then.
        state_factors: [n] factors of the last state.
        noise_factors: [n] rows, the i-th with factors of the i + 1 predicted noises.
        fresh_noise_factors: [n] factors of new unit noise, 0 in steps without.
        prediction_type: What the network predicts, ``epsilon`` or ``v_prediction``.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        timesteps: list[float],
        sigmas: list[float],
        start: float,
        scales_first_input: bool,
        state_factors: list[float],
        noise_factors: list[list[float]],
        fresh_noise_factors: list[float],
        prediction_type: str = "epsilon",
    ) -> None:
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        self.num_inference_steps = len(timesteps)
        self._noises: list[torch.Tensor] = []

    @property
    def init_noise_sigma(self) -> float:
        """What the pipeline multiplies its unit noise by."""
        return 1.0 if self.config.scales_first_input else float(self.config.start)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Begin: the times go to ``device``.

        Raises:
            ValueError: The student takes another number of steps.
        """
        if num_inference_steps not in (None, self.num_inference_steps):
            raise ValueError(
                f"this student takes {self.num_inference_steps} steps, got num_inference_steps="
                f"{num_inference_steps}; give num_inference_steps={self.num_inference_steps}"
            )
        self.timesteps = self.timesteps.to(device)
        self._noises = []

    def scale_model_input(
        self, sample: torch.Tensor, timestep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The network's input: the state itself, but for the first where the pipeline needs it."""
        if self.config.scales_first_input and not self._noises:
            return sample * float(self.config.start)
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The next state.

        Args:
            model_output: [B, C, H, W] what the network predicts for ``sample``.
            timestep: Not used: the steps follow one after another.
            sample: [B, C, H, W] the state.
            generator: Of new noise.
            return_dict: Return a ``SchedulerOutput``, else a tuple of the state.

        Raises:
            ValueError: All steps have been taken.
        """
        if (i := len(self._noises)) == self.num_inference_steps:
            raise ValueError(f"all {i} steps have been taken; call set_timesteps to begin again")
        exact = torch.promote_types(sample.dtype, torch.float32)
        state, predicted = sample.to(exact), model_output.to(exact)
        if self.config.prediction_type == "v_prediction":
            sigma = self.config.sigmas[i]
            predicted = (predicted + sigma * state) / (1 + sigma**2) ** 0.5
        self._noises.append(predicted)
        following = self.config.state_factors[i] * state
        for factor, noise in zip(self.config.noise_factors[i], self._noises, strict=True):
            if factor:
                following = following + factor * noise
        if fresh := self.config.fresh_noise_factors[i]:
            like = {"device": state.device, "dtype": exact}
            following = following + fresh * randn_tensor(state.shape, generator=generator, **like)
        following = following.to(sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

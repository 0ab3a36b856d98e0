"""Generation on the fast path: plans kept per shape, and the choice between them and the reference (`generation`).

B batch, L new tokens, P prompt tokens. Same maths, same noise, other order of roundings: tokens and latents agree with
the reference up to the precision of the dtype (measured in the tests).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dllm_core.errors import DllmError
from dllm_core.layers.compiling import can_compile, complaint, many_shapes
from dllm_core.methods.ldlm import generation, parts
from dllm_core.methods.ldlm.generation import Job
from dllm_core.methods.ldlm.plans import Plan, Shape, Weights
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.stopwatch import Stopwatch

if TYPE_CHECKING:
    from dllm_core.methods.ldlm.method import Method

PathName = Literal["auto", "fast", "compiled", "reference"]
KEPT_PLANS = 8
"""Shapes whose buffers (and graphs) are kept; the one used longest ago goes first."""


def refusal(method: Method, job: Job) -> str | None:
    """Return why a job needs the reference, None where a plan can run it."""
    if method.device.type not in ("cpu", "cuda"):
        return f"plans are made for CPU and CUDA, not for {method.device.type}"
    if method.options.prompt_encoder != "embedding":
        return "prompts are read through the language model"
    if len(set(job.lengths)) > 1 or job.lengths[0] < 1:
        return "rows differ in length"
    if len({len(prompt) for prompt in job.prompts}) > 1:
        return "prompts differ in length"
    return None


def shape_of(job: Job) -> Shape:
    """Return the shape of a job that `refusal` has nothing against."""
    return Shape(
        len(job.prompts),
        len(job.prompts[0]),
        job.lengths[0],
        job.config.max_denoising_steps,
        job.solver,
        job.guidance,
    )


class FastSampler:
    """Plans of one method, made at the first job of a shape.

    Weights are laid out anew when one of the method's has changed (in place or by replacement).

    Args:
        method: in eval mode.
        compiled: through torch.compile: takes seconds per shape. None: on CUDA where it is possible, not on a CPU.
        graphs: replay CUDA graphs; None: on CUDA.

    Attributes:
        wished: torch.compile was wished for.
        compiled: and is used.
        graphs: runs are replayed.
        notes: what was wished for and could not be had, and why.
    """

    def __init__(self, method: Method, *, compiled: bool | None = None, graphs: bool | None = None) -> None:
        self.device = device = method.device
        self._method, self.notes = method, dict[str, str]()
        wanted = device.type == "cuda" if compiled is None else compiled
        reason = can_compile(device) if wanted else None
        if reason is not None:
            self.notes["compile"] = reason
        self.wished, self.compiled = wanted, wanted and reason is None
        self.graphs = device.type == "cuda" if graphs is None else graphs
        self._parts = parts.compiled() if self.compiled else parts.eager()
        self._plans: OrderedDict[Shape, Plan] = OrderedDict()
        self._weights: Weights | None = None
        self._version: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Leave plans to their own method: graphs and laid-out weights cannot be copied."""

    def _state(self) -> tuple[Any, ...]:
        method = self._method
        tensors = [*method.networks.parameters(), method.embedding_VD, *method.times.buffers()]
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)

    def plan(self, shape: Shape) -> Plan:
        """Return the plan of a shape, made if need be; on CUDA it is recorded as a graph."""
        version = self._state()
        if self._weights is None or version != self._version:
            self._plans.clear()
            self._weights, self._version = None, version
            self._weights = Weights(self._method, shape.batch * shape.tokens)
        if shape in self._plans:
            self._plans.move_to_end(shape)
            return self._plans[shape]
        while len(self._plans) >= KEPT_PLANS:
            self._plans.popitem(last=False)
        self._plans[shape] = plan = self._made(shape)
        return plan

    def _made(self, shape: Shape) -> Plan:
        assert self._weights is not None
        plan = Plan(self._method, self._weights, shape, self._parts)
        with many_shapes():
            if self.compiled:
                try:
                    plan.run()
                except RuntimeError as error:  # a compiler that is there and does not work has many ways to say so
                    self.notes["compile"] = complaint(error)
                    self.compiled, self._parts = False, parts.eager()
                    return self._made(shape)
            if self.graphs:
                plan.capture()
        return plan

    def put(self, plan: Plan, job: Job) -> None:
        """Copy a job's prompts and its noises (drawn on the CPU, keyed per sample) to where the plan reads them."""
        plan.ids_BP.copy_(torch.stack(job.prompts))
        latent = plan.noise_RBLK.shape[-1]
        for k, noise_BLK in enumerate(plan.noise_RBLK):
            noise_BLK.copy_(job.normal(latent, generation.noise_stream(k)))

    def generate(self, job: Job) -> GenerationOutput:
        """Run a job that `refusal` has nothing against."""
        watch = Stopwatch(self._method.device)
        plan = self.plan(shape_of(job))
        self.put(plan, job)
        tokens_BL: Tensor = plan.run()
        if job.config.temperature != 0:
            tokens_BL = generation.worded(self._method, job, plan.outputs_BLD)
        watch.mark()
        passes = plan.shape.steps * (1 if job.guidance == 1.0 else 2) + 1
        return job.finished(tokens_BL, self._method.base.eos_token_ids, passes + 2, watch.seconds(1))


def sampler_of(method: Method, *, compiled: bool = False) -> FastSampler:
    """Return the plans that `Method.generate` uses, made at the first call; one set at a time is kept."""
    kept = method._fast
    if kept is None or (kept.device, kept.wished) != (method.device, compiled):
        method._fast = kept = FastSampler(method, compiled=compiled)
    return kept


def generate(method: Method, job: Job, path: PathName = "auto") -> GenerationOutput:
    """Run a job on the fast path where there is one, else on the reference.

    Args:
        method: in eval mode.
        job: what to generate.
        path: `auto`; `fast` to be refused rather than fall back; `compiled` likewise, and through torch.compile, which
            takes seconds to minutes per shape and pays for many generations of one shape on a GPU; `reference`.

    Raises:
        DllmError: `path` asks for what the job cannot have.
    """
    reason = "asked for" if path == "reference" else refusal(method, job)
    if reason is None:
        return sampler_of(method, compiled=path == "compiled").generate(job)
    if path in ("fast", "compiled"):
        raise DllmError(f"This generation has no fast path: {reason}.", "Use path='auto' to fall back.")
    return generation.generate(method, job)

"""What this machine can do at most, measured at the model's own shapes and in its own format.

In: a subject. Out: rates of products, of attention and of memory, and the plain sweep over the
LLM's weights. What counts as a product is found by listening to the networks' linear layers, so it
does not matter how these are arranged. It knows no schedule and no utterance.

The matrix rate is of each shape's product done over and over, weights in the cache; the sweep
takes every weight once, as a token must. A neighbour on the machine can only make a rate worse, so
each is measured anew whenever it is asked for, and the best of the run so far is the answer.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cosyvoice.config import FRAMES_PER_TOKEN
from cosyvoice.models.attention import AttentionForm
from cosyvoice.models.flow import FlowPrompt
from cosyvoice.models.layers import Projection
from cosyvoice.models.packed import Int8Linear, PackedLinear

from .operations import BYTES_PER_WEIGHT, N_ROWS, OPS, Operations, llm_weights
from .subject import Subject
from .timing import Timing, best_of

LINEARS = (Projection, PackedLinear, Int8Linear)
MEMORY_MIB = 512  # far beyond any cache
N_GO = 20
N_MEMORY_GO = 5
MIN_OPS_PER_GO = 1e9  # or the clock sees mostly the call
EARLY_S, OFFLINE_S = 4, 4  # speech that stands in the shapes printed


class Product(NamedTuple):
    """One call of one linear layer."""

    layer: nn.Module
    shape: tuple[int, ...]  # of its input
    n_out: int

    @property
    def n_ops(self) -> int:
        n_rows = torch.Size(self.shape[:-1]).numel()
        return OPS * n_rows * self.shape[-1] * self.n_out

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for calls that cost the same."""
        return type(self.layer), self.shape, self.n_out

    def input(self, device: torch.device) -> Tensor:
        """Random numbers in the type the layer takes without converting."""
        layer = self.layer
        dtype = torch.float32
        if isinstance(layer, PackedLinear):
            dtype = layer.dtype
        elif isinstance(layer, Projection):
            dtype = layer.weight.dtype
        return torch.randn(self.shape, device=device).to(dtype)


@contextmanager
def listening(network: nn.Module) -> Iterator[list[Product]]:
    """The calls of the network's linear layers, in order, while the context lasts."""
    heard: list[Product] = []

    def note(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        heard.append(Product(layer, tuple(given[0].shape), made.shape[-1]))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, LINEARS)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Ceilings:
    """Rates of this machine: the best seen in this run."""

    subject: Subject
    n_go: int = N_GO
    _best: dict[object, float] = field(default_factory=dict)  # rates
    _sweeps: dict[int, tuple[Timing]] = field(default_factory=dict)

    # Memory.

    def read_rate(self) -> float:
        """Bytes a second that a plain sum reads."""
        return self._better("read", self._memory(lambda x, _: x.sum(), n_passes=1))

    def copy_rate(self) -> float:
        """Bytes a second read and written by a copy."""
        return self._better("copy", self._memory(lambda x, y: y.copy_(x), n_passes=2))

    def _memory(self, work: Callable[[Tensor, Tensor], Tensor], *, n_passes: int) -> float:
        x = torch.ones(MEMORY_MIB << 18, device=self.subject.device)  # four bytes each
        y = torch.ones_like(x) if n_passes == 2 else x
        timing = best_of(lambda: work(x, y), n=min(self.n_go, N_MEMORY_GO), wait=self.subject.wait)
        return n_passes * x.nbytes / timing.min_s

    # The LLM.

    def sweep(self, n_rows: int = 1) -> Timing:
        """Every weight of the LLM once, n_rows rows at a time, and nothing else."""
        both = (self._sweep(n_rows), *self._sweeps.get(n_rows, ()))
        self._sweeps[n_rows] = (min(both, key=lambda timing: timing.min_s),)
        return self._sweeps[n_rows][0]

    @torch.inference_mode()
    def _sweep(self, n_rows: int) -> Timing:
        llm, device = self.subject.models.llm, self.subject.device
        with listening(llm) as products:
            hidden = llm.hidden(torch.zeros(n_rows, 1, llm.config.hidden_size, device=device))
            llm.logits(hidden)
        inputs = {p.kind: p.input(device) for p in products}
        calls = [(p.layer, inputs[p.kind]) for p in products]

        def go() -> None:
            for layer, x in calls:
                layer(x)

        return best_of(go, n=self.n_go, n_warm=2, wait=self.subject.wait)

    def llm_bytes(self) -> int:
        """Of the weights a token needs."""
        models = self.subject.models
        return llm_weights(models.llm.config) * BYTES_PER_WEIGHT[models.number_format]

    # The flow.

    def product_rate(self, n_frames: int) -> float:
        """Operations a second of the DiT's linear layers over both rows of n_frames."""
        return self._better(("products", n_frames), self._product_rate(n_frames))

    @torch.inference_mode()
    def _product_rate(self, n_frames: int) -> float:
        products = self._flow_products(n_frames)
        n_calls = Counter(p.kind for p in products)
        total_s = 0.0
        for product in {p.kind: p for p in products}.values():
            total_s += n_calls[product.kind] * self._hot_s(product)
        return sum(p.n_ops for p in products) / total_s

    def _flow_products(self, n_frames: int) -> list[Product]:
        """Those of one Euler step over n_frames without a past."""
        subject, flow = self.subject, self.subject.models.flow
        nobody = FlowPrompt((), subject.mel(0), subject.voice().embedding)
        solver = flow.solver(1, form=subject.models.attention)
        state = flow.start(nobody, solver, subject.models.flow_noise, chunked=False)
        with listening(flow.dit) as products:
            flow.extend(state, subject.tokens(n_frames // FRAMES_PER_TOKEN), last=True)
        return products

    def _hot_s(self, product: Product) -> float:
        x = product.input(self.subject.device)
        n_calls = max(1, round(MIN_OPS_PER_GO / product.n_ops))

        def go() -> None:
            for _ in range(n_calls):
                product.layer(x)

        return best_of(go, n=self.n_go, wait=self.subject.wait).min_s / n_calls

    def attention_rate(self, n_new: int, n_keys: int) -> float:
        """Operations a second of the flow's attention in the form it is used in."""
        form = self.subject.models.attention
        return self._better((n_new, n_keys), self._attention_rate(form, n_new, n_keys))

    @torch.inference_mode()
    def _attention_rate(self, form: AttentionForm, n_new: int, n_keys: int) -> float:
        config, device = self.subject.models.flow.config, self.subject.device

        def heads(n_frames: int) -> Tensor:
            x = torch.randn(N_ROWS, config.n_heads, n_frames, config.head_dim, device=device)
            return x.to(form.dtype)

        q, k, v = heads(n_new), heads(n_keys), heads(n_keys)
        n_ops = 2 * OPS * N_ROWS * config.attention_size * n_new * n_keys
        n_calls = max(1, round(MIN_OPS_PER_GO / n_ops))

        def go() -> None:
            for _ in range(n_calls):
                form.attend(q, [k], [v])

        return n_ops * n_calls / best_of(go, n=self.n_go, wait=self.subject.wait).min_s

    # Floors.

    def floor_s(self, work: Operations, n_frames: int, n_keys: int) -> float:
        """The least time of a flow's linear layers and attention, at these shapes' rates."""
        linear_s = work.linear / self.product_rate(n_frames)
        return linear_s + work.attention / self.attention_rate(n_frames, n_keys)

    def _better(self, of: object, rate: float) -> float:
        self._best[of] = max(rate, self._best.get(of, 0.0))
        return self._best[of]


def figures(ceilings: Ceilings) -> dict[str, Any]:
    """Measure what is printed before everything else."""
    subject = ceilings.subject
    block = subject.models.flow.config.block_frames
    n_prompt = subject.n_prompt_tokens * FRAMES_PER_TOKEN
    n_early = n_prompt + EARLY_S * block
    n_offline = n_prompt + OFFLINE_S * block
    sweep = ceilings.sweep()
    return {
        "memory_read_gb_s": _giga(ceilings.read_rate()),
        "memory_copy_gb_s": _giga(ceilings.copy_rate()),
        "products_gop_s": {
            f"{N_ROWS}x{n}": _giga(ceilings.product_rate(n)) for n in (block, n_offline)
        },
        "attention_gop_s": {
            f"{n}x{n_keys}": _giga(ceilings.attention_rate(n, n_keys))
            for n, n_keys in ((block, n_early), (n_offline, n_offline))
        },
        "matrix_vector_sweep": sweep,
        "matrix_vector_gb_s": _giga(ceilings.llm_bytes() / sweep.min_s),
        "llm_weights_mib": round(ceilings.llm_bytes() / 2**20, 1),
    }


def _giga(rate: float) -> float:
    return round(rate / 1e9, 2)

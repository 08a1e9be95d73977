"""Statistics of a model on a text, put into a file as they are found: Gram matrices of inputs, Fisher information of weights.

X [n, in] are the inputs of a linear layer at all n tokens. G = X'X / n is accumulated block by block; a run that is killed
continues with the next block. The diagonal Fisher information needs gradients through the whole model, which must fit
in memory; such a run begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from weightworks.engine.blockwise import hidden_size
from weightworks.engine.job import Job
from weightworks.engine.walk import Walk
from weightworks.store.statistics import packed
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.gram import Gram
from weightworks.stream.skeleton import place

LOGITS = 5  # tensors of the size of a window's logits that a gradient step holds
STATES = 40  # of the size of its hidden states, a block
HELD = 8  # bytes a parameter while Fisher information is gathered: the weight and its sum; gradients go as they come


def gram_specs(job: Job) -> list[TensorSpec]:
    """The tensors of a file of Gram matrices."""
    specs = []
    for name, linear in job.linears.items():
        columns = linear.shape[1]
        specs.append(TensorSpec(f"gram.{name}", (columns * (columns + 1) // 2,), torch.float32))
        specs.append(TensorSpec(f"tokens.{name}", (), torch.int64))
    return specs


@torch.no_grad()
def gather_grams(job: Job, writer: CheckpointWriter, walk: Walk, limit: int) -> list[str]:
    """Write the Gram matrix of every linear's inputs; returns what fell short, a line each.

    Linears that read the same input have the same matrix. At most ``limit`` bytes of matrices are held at a time.
    """

    def look(index: int) -> list[str]:
        notes = []
        for part in walk.inputs(index, Gram, limit):
            triangles: dict[int, torch.Tensor] = {}
            for name, gram in part.items():
                if id(gram) not in triangles:
                    triangles[id(gram)] = packed(gram.mean().cpu())
                writer.put(f"gram.{name}", triangles[id(gram)])
                writer.put(f"tokens.{name}", torch.tensor(gram.tokens))
                if gram.tokens == 0:
                    notes.append(f"{name}: no token reached it")
                if gram.dropped:
                    notes.append(f"{name}: {gram.dropped} inputs were not finite and left out")
        return notes

    return [note for notes in walk.run(look) for note in notes]


def fisher_specs(job: Job) -> list[TensorSpec]:
    """The tensors of a file of Fisher information: every parameter of the model, by the checkpoint's tensors."""
    return [
        TensorSpec(f"fisher.{piece.tensor}", job.view.shape(piece.tensor), torch.float32)
        for name in job.skeleton.learnable
        for piece in job.skeleton.pieces[name]
    ]


def gather_fisher(job: Job, writer: CheckpointWriter, tokens: torch.Tensor, *, labels: str) -> list[str]:
    """Write the diagonal Fisher information a token of every parameter, from windows int64 [n, seq]; returns notes as above.

    F = E_x E_{y ~ p(.|x)} (d log p(y|x) / d theta)^2 for ``labels="model"``: a label is drawn for every position, so scores
    of different positions are uncorrelated and the squared gradient of a window's sum is an unbiased estimate of the sum of
    the squares. With ``labels="text"`` they are the text's own tokens, and the squares are of whole windows.
    """
    skeleton, names = job.skeleton, job.skeleton.learnable
    skeleton.load(job.view, list(skeleton.pieces), torch.float32, job.device)
    sums: dict[str, torch.Tensor] = {}
    for name in names:
        parameter = skeleton.get(name)
        sums[name] = torch.zeros_like(parameter, requires_grad=False)
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(_adder(sums[name]))
    job.progress.begin("window", tokens.shape[0], 0)
    for number in range(tokens.shape[0]):
        window = tokens[number : number + 1].to(job.device)
        with torch.enable_grad():
            logits = skeleton.model(input_ids=window, use_cache=False).logits[0, :-1].float()  # [seq - 1, vocabulary]
            targets = window[0, 1:] if labels == "text" else drawn(logits.detach(), job.settings.seed, number)
            nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        job.progress.step(f"window {number + 1}")
    job.progress.end()
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    for name in names:
        for piece in skeleton.pieces[name]:
            part = place(sums[name], piece) if len(skeleton.pieces[name]) > 1 else sums[name]
            writer.put(f"fisher.{piece.tensor}", part.div(positions).cpu().contiguous())
        del sums[name]
    skeleton.unload(list(skeleton.pieces))
    writer.done("fisher")
    return []


def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Adds the square of a parameter's gradient to ``total`` as soon as it is whole, and lets it go."""

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        total.addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    return add


def drawn(logits: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    """A label for each row of ``logits`` [seq, vocabulary] from its own distribution; the same for a seed and a window."""
    generator = torch.Generator().manual_seed((seed << 32) + number)
    probabilities = torch.softmax(logits.double(), dim=-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


def fisher_bytes(job: Job, length: int) -> int:
    """Memory that gathering Fisher information takes with windows of ``length`` tokens, beyond the process itself."""
    shapes = [job.view.shape(piece.tensor) for name in job.skeleton.learnable for piece in job.skeleton.pieces[name]]
    counts = list(map(math.prod, shapes))
    config = job.skeleton.model.config.get_text_config()
    states = STATES * hidden_size(job) * len(job.skeleton.blocks)
    return HELD * sum(counts) + 8 * max(counts) + 4 * length * (LOGITS * int(config.vocab_size) + states)


def gram_bytes(job: Job) -> int:
    """The same for Gram matrices, beside those of a round and the activations: the largest block in float32, one triangle."""
    skeleton = job.skeleton
    blocks = [
        sum(skeleton.get(name).numel() for name in skeleton.names_of(index)) for index in range(len(skeleton.blocks))
    ]
    outside = sum(skeleton.get(name).numel() for name in skeleton.names_of(None))
    return 4 * max(*blocks, outside) + 4 * max(linear.shape[1] for linear in job.linears.values()) ** 2

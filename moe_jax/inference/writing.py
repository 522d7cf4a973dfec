"""Shows texts while they are generated, and how fast that was."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.inference.generation import Generation
from moe_jax.inference.text import TextStream


def write(
    generation: Generation,
    prompts: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    stops: Sequence[str],
    show: Callable[[str], None],
) -> list[str]:
    """Shows each prompt and its continuation: one as it comes, several in order, when they end.

    Args:
      prompts: those of `generation`.
      stops: texts before which a text ends.
      show: takes parts of the output, line breaks included.
    Returns:
      Lines for a person on what was done.
    """
    streams = [TextStream(tokenizer, prompt, stops) for prompt in prompts]
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    count, shown, first = 0, 0, None
    if len(prompts) == 1:
        show(texts[0])
    for new in generation:
        first = first or time.perf_counter()
        count += sum(map(len, new))
        for row, (stream, tokens) in enumerate(zip(streams, new, strict=True)):
            text = stream.add(tokens, last=generation.has_ended(row))
            if stream.stopped and not generation.has_ended(row):
                generation.stop(row)
            if len(prompts) == 1:
                show(text)
            texts[row] += text
        while len(prompts) > 1 and shown < len(prompts) and generation.has_ended(shown):
            show(f"--- prompt {shown + 1} ---\n{texts[shown]}\n\n")
            shown += 1
    if len(prompts) == 1:
        show("\n\n")
    end = time.perf_counter()
    assert first is not None
    text = f"tokens      {count:,} in {end - generation.begun:.2f}s"
    text += f"; the first after {first - generation.begun:.2f}s"
    if count > len(prompts):
        text += f", then {(count - len(prompts)) / (end - first):,.1f} tokens/s"
    lines = [text]
    if generation.drafted:
        share = generation.accepted / generation.drafted
        lines.append(
            f"drafts      {generation.accepted:,} of {generation.drafted:,} accepted ({share:.1%})"
        )
    return lines

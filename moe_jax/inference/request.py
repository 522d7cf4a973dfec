"""What a person asks of a model, checked before anything is compiled."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import sharding
from moe_jax.config import MESH_AXES, MeshConfig, ModelConfig, UserError
from moe_jax.data.tokenizer import IdTokenizer, Tokenizer
from moe_jax.inference.generation import check_prompts, check_speculation
from moe_jax.inference.redundancy import check_redundancy
from moe_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts, of one of the three kinds, and how they are continued.

    texts: prompts as text.
    ids: prompts as token ids, "1,2,3" each.
    files: prompts as text files, less one line break at the end.
    cache_length: slots of the cache; None for what the longest prompt needs.
    stops: texts before which a text ends.
    """

    texts: Sequence[str] = ()
    ids: Sequence[str] = ()
    files: Sequence[str] = ()
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stops: Sequence[str] = ()
    cache_length: int | None = None
    speculative: bool = False

    def check(self) -> None:
        """Raises:
        ValueError: what is wrong for any model.
        """
        self.sampling.check()
        given = {"prompt": self.texts, "prompt_ids": self.ids, "prompt_file": self.files}
        kinds = [f"--{name}" for name, values in given.items() if values]
        if not kinds:
            raise UserError("there is no prompt; give --prompt, --prompt_ids or --prompt_file")
        if len(kinds) > 1:
            raise UserError(f"{' and '.join(kinds)} are given together; give one kind of prompt")
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.cache_length is not None and self.cache_length < 2:
            raise UserError(
                f"--cache_length={self.cache_length} must be at least 2, for a token and the next"
            )
        if "" in self.stops:
            raise UserError("--stop is empty; give the text before which to stop")
        if self.speculative:
            check_speculation(self.sampling, depth=1)

    def read(self, tokenizer: Tokenizer) -> list[np.ndarray]:
        """The prompts' token ids.

        Raises:
          ValueError: a prompt is empty or cannot be read.
        """
        if self.stops and isinstance(tokenizer, IdTokenizer):
            raise UserError("--stop is text, and the checkpoint has no tokenizer; leave it out")
        if self.ids:
            return [_parse_ids(text) for text in self.ids]
        texts = self.texts or [_read(Path(file)) for file in self.files]
        for i, text in enumerate(texts):
            if not text:
                source = f" of {self.files[i]}" if self.files else ""
                raise UserError(f"the prompt{source} is empty; give at least one character")
        return [tokenizer.prompt(text) for text in texts]

    def slots(self, prompts: Sequence[np.ndarray], config: ModelConfig) -> int:
        """Of the cache.

        Raises:
          ValueError: the model cannot serve these prompts, or not at this length.
        """
        if self.speculative:
            check_speculation(self.sampling, config.num_nextn_predict_layers)
        limit, longest = config.max_position_embeddings, max(map(len, prompts))
        slots = self.cache_length or longest + self.max_new_tokens
        check_prompts(prompts, slots, config.vocab_size)
        if slots > limit and self.cache_length:
            raise UserError(
                f"--cache_length={slots} exceeds the {limit} positions of the model"
                " (max_position_embeddings); shorten it"
            )
        if slots > limit:
            raise UserError(
                f"a prompt of {longest} tokens and --max_new_tokens={self.max_new_tokens} exceed "
                f"the {limit} positions of the model (max_position_embeddings); shorten one"
            )
        return slots


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of "fsdp=2,expert=4"; axes that are not named have size 1, and so has "".

    Raises:
      ValueError: an axis that does not exist or cannot be split, or a size that is no number.
    """
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    usable = [axis for axis in MESH_AXES if axis not in ("tensor", "context", "pipeline")]
    for part in filter(None, text.split(",")):
        axis, _, size = part.strip().partition("=")
        if axis not in usable:
            raise UserError(f"--mesh={text}: {axis!r} is none of the axes {', '.join(usable)}")
        if not size.isdecimal() or not int(size):
            raise UserError(f"--mesh={text}: {axis} needs a size of at least 1, as in fsdp=2")
        sizes[axis] = int(size)
    return MeshConfig(num_cpu_devices=math.prod(sizes.values()), **sizes)


def make_mesh(mesh: MeshConfig, config: ModelConfig, redundant_experts: int = 0) -> Mesh:
    """The mesh over the first devices, as many as it needs.

    Raises:
      ValueError: there are too few, or the experts, redundant ones too, do not divide over them.
    """
    wanted, devices = math.prod(getattr(mesh, axis) for axis in MESH_AXES), jax.devices()
    if wanted > len(devices):
        raise UserError(
            f"--mesh needs {wanted} devices and there are {len(devices)}; make it smaller"
        )
    shards, experts = mesh.expert_outer * mesh.expert, config.moe.num_experts
    if config.first_k_dense_replace < config.num_hidden_layers and experts % shards:
        raise UserError(
            f"--mesh splits experts over {shards} devices, which does not divide the model's "
            f"{experts}; change expert or expert_outer"
        )
    check_redundancy(redundant_experts, config, shards)
    return sharding.make_mesh(mesh, devices[:wanted])


def _parse_ids(text: str) -> np.ndarray:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not part.removeprefix("-").isdecimal():
            raise UserError(f"--prompt_ids={text}: {part!r} is no token id; give them as 1,2,3")
    return np.array([int(part) for part in parts], np.int64)


def _read(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"--prompt_file={file}: there is no such file")
    try:
        return file.read_text("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file={file} is not UTF-8: {error}") from None

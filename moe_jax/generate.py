"""Writes on after prompts.

    python -m moe_jax.generate --checkpoint=runs/tiny --prompt="def "

    python -m moe_jax.generate --checkpoint=DeepSeek-V2-Lite --prompt="The" --mesh=fsdp=2,expert=4

The checkpoint is a work directory of training, one checkpoint, or a Hugging Face folder.
"""

import dataclasses
import functools
from pathlib import Path

import jax
from absl import flags

from moe_jax import command_line, platform
from moe_jax.config import DTYPES, BackendConfig, UserError
from moe_jax.data.tokenizer import open_tokenizer
from moe_jax.inference.cache import describe
from moe_jax.inference.generation import Generator
from moe_jax.inference.redundancy import measure_load, with_redundant_experts
from moe_jax.inference.request import Request, make_mesh, parse_mesh
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.writing import write
from moe_jax.interop.orbax_files import find_tokenizer
from moe_jax.interop.weights import load_model, read_weights
from moe_jax.units import format_bytes

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The folder to read.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue")
PROMPT_IDS = flags.DEFINE_multi_string("prompt_ids", [], "Token ids to continue, as 1,2,3")
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "A file with text to continue")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "After which a text ends.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "0: greedy; 0.7, or 0 with --speculative.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draws among so many tokens; 0 for all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draws among the best tokens of this total probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
STOP = flags.DEFINE_multi_string("stop", [], "Text before which to end")
CACHE_LENGTH = flags.DEFINE_integer("cache_length", None, "Most tokens of a row, prompt included.")
MESH = flags.DEFINE_string("mesh", "", "As fsdp=2,expert=4; one device without it.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Of weights, cache and products.")
KEEP_FP8 = flags.DEFINE_bool(
    "keep_fp8", False, "Weights that the checkpoint has in FP8 stay so, and are widened in use."
)
SPECULATIVE = flags.DEFINE_bool(
    "speculative", False, "Drafts tokens by multi-token prediction; the same greedy text, sooner."
)
REDUNDANT = flags.DEFINE_integer("redundant_experts", 0, "Replicas of hot experts, in each layer.")


def main(_: list[str]) -> None:
    if CHECKPOINT.value is None:
        raise UserError("--checkpoint is missing; try --checkpoint=runs/tiny")
    path, redundant = Path(CHECKPOINT.value), REDUNDANT.value
    speculative, temperature = SPECULATIVE.value, TEMPERATURE.value
    if temperature is None:
        temperature = 0.0 if speculative else 0.7
    request = Request(
        texts=PROMPT.value,
        ids=PROMPT_IDS.value,
        files=PROMPT_FILE.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=Sampling(temperature, TOP_K.value, TOP_P.value),
        stops=STOP.value,
        cache_length=CACHE_LENGTH.value,
        speculative=speculative,
    )
    request.check()
    if redundant and KEEP_FP8.value:
        raise UserError("--redundant_experts takes no weights of --keep_fp8; leave one out")
    mesh_config = parse_mesh(MESH.value)
    lines = platform.start(mesh_config)

    config, _, notes = read_weights(path, KEEP_FP8.value)
    tokenizer = open_tokenizer(find_tokenizer(path), config.vocab_size)
    prompts = request.read(tokenizer)
    slots = request.slots(prompts, config)
    mesh = make_mesh(mesh_config, config, redundant)
    # What suited the devices that trained need not suit these.
    config = dataclasses.replace(config, backends=BackendConfig())
    if not speculative:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    lines += [f"note        {note}" for note in notes]
    lines += describe(config, slots, len(prompts), mesh, DTYPE.value, speculative)
    print("\n".join(lines), flush=True)

    model = load_model(path, config, mesh, DTYPE.value, keep_fp8=KEEP_FP8.value)
    if KEEP_FP8.value:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights))
        print(f"weights     {format_bytes(size)} on all devices, FP8 kept", flush=True)
    if redundant:
        model, line = with_redundant_experts(model, measure_load(model, prompts), redundant)
        print(line, flush=True)
    generator = Generator(
        model,
        slots=slots,
        sampling=request.sampling,
        end_ids=tokenizer.end_ids,
        speculative=speculative,
    )
    generation = generator.start(prompts, request.max_new_tokens, SEED.value)
    print(f"compiled    in {generator.compile_seconds:.1f}s\n", flush=True)
    show = functools.partial(print, end="", flush=True)
    print("\n".join(write(generation, prompts, tokenizer, request.stops, show)))


if __name__ == "__main__":
    command_line.run(main)

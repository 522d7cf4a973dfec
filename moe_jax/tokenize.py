"""Makes a folder of tokens of files, and a tokenizer of one's own if wanted.

    python -m moe_jax.tokenize --source='books/*.txt' --target=tokens --tokenizer=v3/tokenizer.json

    python -m moe_jax.tokenize --source='books/*.txt' --target=tokens --tokenizer=own.json
        --vocab_size=32768

With --vocab_size, the tokenizer is trained on the source first, if its file is not there. The same
command, run again, goes on from the last whole shard. Training reads the folder as
--config.data.source.
"""

import json
import time
from pathlib import Path

from absl import flags

from moe_jax import command_line, validation
from moe_jax.config import DataConfig, UserError
from moe_jax.data.files import list_files
from moe_jax.data.ngrams import open_screen
from moe_jax.data.token_folder import MANIFEST, SHARD_TOKENS
from moe_jax.data.tokenization import tokenize, train_tokenizer
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.units import format_bytes, format_count, format_duration

DEFAULT = DataConfig()
SOURCE = flags.DEFINE_string("source", None, "Files, as config.data.source has them.")
TARGET = flags.DEFINE_string("target", None, "The folder to write.")
TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "As config.data.tokenizer has it.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Of a BPE to train and write there.")
RECORDS = flags.DEFINE_enum("records", "text", ["text", "chats", "pairs"], "What a record is.")
TEXT_FIELD = flags.DEFINE_string("text_field", DEFAULT.text_field, "Of a text.")
MESSAGES_FIELD = flags.DEFINE_string("messages_field", DEFAULT.messages_field, "Of a chat.")
PROMPT_FIELD = flags.DEFINE_string("prompt_field", DEFAULT.prompt_field, "Of a pair.")
ANSWER_FIELD = flags.DEFINE_string("answer_field", DEFAULT.answer_field, "Of a pair.")
MESSAGE_FORMAT = flags.DEFINE_string("message_format", DEFAULT.message_format, "Of a message.")
SKIP_INVALID = flags.DEFINE_bool("skip_invalid", False, "Counts what cannot be used.")
BENCHMARK = flags.DEFINE_string("benchmark", None, "Files whose n-grams no document may have.")
BENCHMARK_NGRAMS = flags.DEFINE_string("benchmark_ngrams", DEFAULT.benchmark_ngrams, "Which.")
BENCHMARK_FIELDS = flags.DEFINE_string("benchmark_fields", "", "Of its records; all by default.")
SHARD_TOKENS_FLAG = flags.DEFINE_integer("shard_tokens", SHARD_TOKENS, "Of a shard, about.")


def main(_: list[str]) -> None:
    if SOURCE.value is None or TARGET.value is None:
        raise UserError("give --source and --target")
    if SHARD_TOKENS_FLAG.value < 1:
        raise UserError(f"--shard_tokens={SHARD_TOKENS_FLAG.value} must be at least 1")
    config = DataConfig(
        source=SOURCE.value,
        records=RECORDS.value,
        text_field=TEXT_FIELD.value,
        messages_field=MESSAGES_FIELD.value,
        prompt_field=PROMPT_FIELD.value,
        answer_field=ANSWER_FIELD.value,
        message_format=MESSAGE_FORMAT.value,
        skip_invalid=SKIP_INVALID.value,
        benchmark=BENCHMARK.value,
        benchmark_ngrams=BENCHMARK_NGRAMS.value,
        benchmark_fields=BENCHMARK_FIELDS.value,
    )
    validation.check_records(config)
    files, target, begin = (
        list_files(SOURCE.value, "--source"),
        Path(TARGET.value),
        time.perf_counter(),
    )
    if VOCAB_SIZE.value is not None and not Path(TOKENIZER.value).exists():
        size = train_tokenizer(Path(TOKENIZER.value), files, config, VOCAB_SIZE.value)
        print(
            f"trained     {TOKENIZER.value}: on {format_bytes(size)} in "
            f"{format_duration(time.perf_counter() - begin)}",
            flush=True,
        )
    tokenizer, begin = load_tokenizer(TOKENIZER.value), time.perf_counter()
    tokenize(target, files, config, tokenizer, open_screen(config), SHARD_TOKENS_FLAG.value)
    manifest = json.loads((target / MANIFEST).read_text())
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"].items())
    print(
        f"tokenizer   {TOKENIZER.value}: {tokenizer.vocab_size:,} ids\n"
        f"written     {target}: {manifest['documents']:,} documents, "
        f"{format_count(manifest['tokens'])} tokens in {len(manifest['shards'])} shards of "
        f"{manifest['dtype']} in {format_duration(time.perf_counter() - begin)}"
        + (f" (skipped: {skipped})" if skipped else "")
    )


if __name__ == "__main__":
    command_line.run(main)

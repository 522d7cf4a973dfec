"""Says how much of a benchmark occurs in a corpus.

    python -m moe_jax.contamination --corpus='books/*.jsonl' --benchmark=gsm8k_test.jsonl

An item is hit if one of its n-grams occurs in a document. For code and maths compare characters:
--ngrams=characters:50. Training leaves such documents out with --config.data.benchmark.
"""

import collections
import json
import time
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax import command_line
from moe_jax.config import DataConfig, UserError
from moe_jax.data.files import list_files, place_name, scan
from moe_jax.data.ngrams import Ngrams, read_benchmark, text_of
from moe_jax.units import format_bytes, format_duration

DEFAULT = DataConfig()
CORPUS = flags.DEFINE_string("corpus", None, "Files, as config.data.source has them.")
BENCHMARK = flags.DEFINE_string("benchmark", None, "A glob of JSONL or text files.")
NGRAMS = flags.DEFINE_string("ngrams", DEFAULT.benchmark_ngrams, "words:N or characters:N.")
FIELDS = flags.DEFINE_string("fields", "", "Of the benchmark, as question,answer; all by default.")
TEXT_FIELD = flags.DEFINE_string("text_field", DEFAULT.text_field, "Of the corpus.")
SKIP_INVALID = flags.DEFINE_bool("skip_invalid", False, "Counts what cannot be used.")
HITS = flags.DEFINE_string("hits", None, "A file for the items that are hit, one a line.")
SHOWN = 10  # items and, of each, documents


def main(_: list[str]) -> None:
    if CORPUS.value is None or BENCHMARK.value is None:
        raise UserError("give --corpus and --benchmark")
    command_line.check_writable(HITS)
    config = DataConfig(text_field=TEXT_FIELD.value, skip_invalid=SKIP_INVALID.value)
    items = read_benchmark(list_files(BENCHMARK.value, "--benchmark"), FIELDS.value)
    ngrams = Ngrams(items, NGRAMS.value)
    print(
        f"benchmark   {BENCHMARK.value}: {len(items):,} items, {len(ngrams.texts):,} different "
        f"n-grams of {NGRAMS.value}",
        flush=True,
    )

    files, begin = list_files(CORPUS.value, "--corpus"), time.perf_counter()
    sizes = [file.path.stat().st_size for file in files]
    places: dict[int, list[str]] = collections.defaultdict(list)  # of each n-gram that was found
    skipped: collections.Counter[str] = collections.Counter()
    documents = hit_documents = size = 0
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=sum(sizes))
        for file, place, document in scan(files, config, skipped):
            text = text_of(document)
            found = ngrams.find(text)
            for number in found:
                if len(places[number]) < SHOWN:
                    places[number].append(place_name(files[file].name, place))
            documents, hit_documents = documents + 1, hit_documents + bool(found)
            size += sum(len(piece.text) for piece in document)
            progress.update(task, completed=sum(sizes[:file]) + place.offset)
    seconds = time.perf_counter() - begin
    left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    print(
        f"corpus      {CORPUS.value}: {documents:,} documents, {format_bytes(size)} in "
        f"{format_duration(seconds)}, {format_bytes(size / seconds)}/s"
        + (f" (skipped: {left_out})" if left_out else "")
    )

    hits = []
    for item, numbers in zip(items, ngrams.of_item, strict=True):
        found = [number for number in numbers.tolist() if number in places]
        if found:
            where = dict.fromkeys(name for number in found for name in places[number])
            hits.append(
                {
                    "item": item.name,
                    "share": len(found) / len(numbers),
                    "documents": list(where)[:SHOWN],
                    "ngrams": [ngrams.texts[number] for number in found[:SHOWN]],
                }
            )
    total = np.sum([len(numbers) for numbers in ngrams.of_item])
    share = np.sum([n in places for numbers in ngrams.of_item for n in numbers.tolist()]) / total
    print(
        f"hit         {len(hits):,} of {len(items):,} items ({len(hits) / len(items):.1%}) by "
        f"{hit_documents:,} documents; {share:.1%} of all n-grams"
    )
    for hit in sorted(hits, key=lambda hit: -hit["share"])[:SHOWN]:
        print(f"            {hit['share']:6.1%} of {hit['item']} in {', '.join(hit['documents'])}")
    if len(hits) > SHOWN:
        print(f"            and {len(hits) - SHOWN:,} items more")
    if HITS.value:
        Path(HITS.value).write_text("".join(json.dumps(hit) + "\n" for hit in hits))
        print(f"written     {HITS.value}")


if __name__ == "__main__":
    command_line.run(main)

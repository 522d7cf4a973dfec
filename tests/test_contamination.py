"""The command that looks for a benchmark in a corpus finds all that was planted."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from data_command import run

NOUNS = [f"{a}{b}" for a in ("ap", "pe", "ki", "lo", "mu", "ra") for b in ("ple", "ar", "wi", "ss")]


_run = functools.partial(run, "contamination")


@pytest.mark.parametrize("kind", ["words:13", "characters:50"])
def test_all_that_was_planted_is_found(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)

    def sentence(count: int) -> str:
        return " ".join(rng.choice(NOUNS, count))

    items = [{"question": sentence(30), "answer": f"#### {i}"} for i in range(60)]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    planted = rng.choice(60, 12, replace=False).tolist()
    documents = [sentence(100) for _ in range(200)]
    for place, number in enumerate(planted):
        text = items[number]["question"]
        half = text if place % 2 else " ".join(text.split()[:15])
        documents[place * 7] += f".\n{half.upper()}!\n" + sentence(9)
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    done = _run(
        tmp_path,
        *("--corpus=*us.jsonl", "--benchmark=bench.jsonl", f"--ngrams={kind}"),
        *("--hits=hits.jsonl", "--fields=question"),
    )
    assert done.returncode == 0, done.stderr
    assert "benchmark   bench.jsonl: 60 items, " in done.stdout
    assert "hit         12 of 60 items (20.0%) by 12 documents; " in done.stdout
    hits = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()]
    assert {hit["item"] for hit in hits} == {f"bench.jsonl:{n + 1}" for n in planted}
    for hit in hits:
        place = planted.index(int(hit["item"].split(":")[1]) - 1)
        assert hit["documents"] == [f"corpus.jsonl:{place * 7 + 1}"]
        assert hit["share"] == 1 if place % 2 else 0 < hit["share"] < 0.7
        assert hit["ngrams"]


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for arguments, sentence in (
        (["--corpus=a.txt"], "give --corpus and --benchmark"),
        (["--corpus=a.txt", "--benchmark=b"], "--benchmark='b' matches no file"),
        (["--corpus=b", "--benchmark=a.txt"], "--corpus='b' matches no file"),
        (["--corpus=a.txt", "--benchmark=a.txt", "--ngrams=13"], "n-grams of '13' are none"),
        (["--corpus=a.txt", "--benchmark=a.txt", "--hits=no/x"], "--hits=no/x cannot be written"),
    ):
        done = _run(tmp_path, *arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}")

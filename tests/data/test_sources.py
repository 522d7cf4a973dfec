"""Several sources as one corpus, and streams that draw of each by its weight."""

import collections
import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from moe_jax.config import Config, DataConfig, Source, Stage, TrainingConfig, UserError
from moe_jax.curriculum import source_weights, steps_until_dry
from moe_jax.data.corpus import Span, split_holdout
from moe_jax.data.documents import Piece
from moe_jax.data.loader import train_batches
from moe_jax.data.packing import tokens_drawn
from moe_jax.data.sources import open_corpus
from moe_jax.data.token_folder import write_token_folder
from moe_jax.data.tokenizer import load_tokenizer


def _write(folder: Path, name: str, letter: str, count: int) -> str:
    lines = [json.dumps({"text": letter * (5 + i)}) for i in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder / f"{name}.jsonl")


def _data(tmp_path: Path, *weights: float, **fields: Any) -> DataConfig:
    """A source of each letter from "a" on, of 20, 30, ... documents."""
    sources = tuple(
        Source(_write(tmp_path, f"of_{letter}", letter, 20 + 10 * i), weight)
        for i, (letter, weight) in enumerate(zip("abcdef", weights, strict=False))
    )
    return DataConfig(source=sources, cache=str(tmp_path / "cache"), **fields)


def test_documents_are_numbered_through(tmp_path: Path) -> None:
    corpus = open_corpus(_data(tmp_path, 0.7, 0.3))
    assert corpus.lengths.tolist() == [5 + i for i in range(20)] + [5 + i for i in range(30)]
    assert corpus.tokens(19)[0].tolist() == [256, *[ord("a")] * 24, 256]
    assert corpus.tokens(20)[0].tolist() == [256, *[ord("b")] * 5, 256]
    assert corpus.name(22) == f"{tmp_path}/of_b.jsonl:3"


def test_one_source_with_a_weight_is_the_same_as_its_path(tmp_path: Path) -> None:
    config = _data(tmp_path, 1.0)
    plain = open_corpus(DataConfig(source=config.sources[0].path))
    assert open_corpus(config).fingerprint == plain.fingerprint


def test_the_fingerprint_is_of_all_sources_and_their_weights(tmp_path: Path) -> None:
    configs = [_data(tmp_path, *weights) for weights in ((0.7, 0.3), (0.5, 0.5), (0.3, 0.3, 0.4))]
    again = _data(tmp_path, 0.7, 0.3)
    prints = [open_corpus(config).fingerprint for config in configs]
    assert len(set(prints)) == 3 and open_corpus(again).fingerprint == prints[0]


def test_documents_of_each_source_are_held_out(tmp_path: Path) -> None:
    corpus = open_corpus(_data(tmp_path, 0.7, 0.3))
    (first, second), held_out = split_holdout(corpus.parts, 10)
    assert [span.document for span in held_out] == [9, 19, 29, 39, 49]
    assert {span.document for span in first} == set(range(20)) - {9, 19}
    assert {span.document for span in second} == set(range(20, 50)) - {29, 39, 49}


def test_batches_hold_each_source_by_its_weight_and_go_on_from_a_state(tmp_path: Path) -> None:
    data = _data(tmp_path, 0.6, 0.3, 0.1, num_streams=2, packing_bins=4, prefetch=0)
    config = Config(
        data=DataConfig(**{**vars(data), "stages": (Stage(32),)}),
        training=TrainingConfig(tokens_per_step=256),
    )
    corpus = open_corpus(config.data)
    groups, _ = split_holdout(corpus.parts, 0)
    iterator = train_batches(config, corpus, groups, (0, 1, 1))
    batches = list(itertools.islice(iterator, 60))
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    counts = np.array([(tokens == ord(letter)).sum() for letter in "abc"])
    np.testing.assert_allclose(counts / counts.sum(), [0.6, 0.3, 0.1], atol=0.02)

    state = json.loads(json.dumps(iterator.get_state()))
    drawn = np.array(tokens_drawn(state["streams"].values()))
    np.testing.assert_allclose(drawn / drawn.sum(), [0.6, 0.3, 0.1], atol=0.02)
    assert len(json.dumps(state)) < 4000
    resumed = train_batches(config, corpus, groups, (0, 1, 1), state)
    for a, b in zip(itertools.islice(iterator, 5), resumed, strict=False):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


BY_STAGE = (
    Stage(32, 20 * 256),
    Stage(32, 40 * 256, weights=(0.0, 0.1, 0.9)),
    Stage(64, weights=(0.5, 0.5, 0.0)),
)


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_each_stage_has_its_own_mixture_from_its_first_row_on(tmp_path: Path, packing: str) -> None:
    data = _data(tmp_path, 0.6, 0.3, 0.1, num_streams=2, packing_bins=16, packing=packing)
    config = Config(
        data=DataConfig(**{**vars(data), "stages": BY_STAGE}),
        training=TrainingConfig(tokens_per_step=256, num_steps=60),
    )
    corpus = open_corpus(config.data)
    groups, _ = split_holdout(corpus.parts, 0)

    def batches(state: Any = None) -> Any:
        return train_batches(config, corpus, groups, (0, 1, 1), state)

    whole, states = [], []
    with contextlib.closing(batches()) as iterator:
        for _ in range(60):
            states.append(json.loads(json.dumps(iterator.get_state())))
            whole.append(next(iterator))
        last = iterator.get_state()
    drawn = np.zeros(3)
    for start, stage in zip((0, 20, 40), BY_STAGE, strict=True):
        tokens = np.concatenate([batch["tokens"].ravel() for batch in whole[start : start + 20]])
        counts = np.array([(tokens == ord(letter)).sum() for letter in "abc"])
        wanted = source_weights(config, stage)
        np.testing.assert_allclose(counts / counts.sum(), wanted, atol=0.03)
        assert not counts[np.array(wanted) == 0].any(), "from the first row on"
        drawn += counts
    # Boundaries are tokens as well.
    np.testing.assert_allclose(
        tokens_drawn(last["streams"].values()) / drawn, np.ones(3), atol=0.12
    )
    for step in (10, 20, 21, 40):  # within a stage, and with the last batch before a border
        with contextlib.closing(batches(states[step])) as iterator:
            for wanted, found in zip(whole[step : step + 12], iterator, strict=False):
                for name in wanted:
                    np.testing.assert_array_equal(found[name], wanted[name])


def test_tokens_of_two_tokenizers_do_not_mix(tmp_path: Path) -> None:
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "own.json"))
    own = load_tokenizer(str(tmp_path / "own.json"))

    def documents(skipped: collections.Counter[str]) -> list[tuple[Piece, ...]]:
        return [(Piece(b"a b"),)]

    write_token_folder(tmp_path / "tokens", documents, own, {}, weighted=False)
    text = _write(tmp_path, "text", "a", 3)
    config = DataConfig(source=(Source(text, 0.5), Source(str(tmp_path / "tokens"), 0.5)))
    with pytest.raises(UserError, match=r"has '.*text\.jsonl' and '.*tokens', whose tokens are of"):
        open_corpus(config)


def test_ids_that_the_model_lacks_are_known_before_anything_is_read(tmp_path: Path) -> None:
    config = _data(tmp_path, 1.0)
    (tmp_path / "of_a.jsonl").write_text("not JSON")
    with pytest.raises(UserError) as error:
        open_corpus(config, vocab_size=256)
    assert str(error.value) == "config.model.vocab_size=256 must be at least the tokenizer's 257"
    with pytest.raises(UserError, match="must be at least the tokenizer's 260"):
        open_corpus(_data(tmp_path, 1.0, fim_rate=0.1), vocab_size=257)


def test_a_run_ends_before_a_source_is_drawn_too_often() -> None:
    def until(*sources: Source, stages: tuple[Stage, ...] = (Stage(),)) -> tuple[int, int] | None:
        config = Config(
            data=DataConfig(source=sources, stages=stages),
            training=TrainingConfig(tokens_per_step=1000, num_steps=100),
        )
        return steps_until_dry(config, [10_000, 20_000])

    assert until(Source("a", 0.5), Source("b", 0.5)) is None
    assert until(Source("a", 0.5, 1.0), Source("b", 0.5)) == (20, 0)
    assert until(Source("a", 0.5, 1.0), Source("b", 0.5, 0.25)) == (10, 1)
    assert until(Source("a", 0.1, 2.0), Source("b", 0.9)) is None, "it lasts longer than the run"
    assert until(Source("a", 0.9999, 0.01), Source("b", 0.0001)) == (0, 0)
    # By the weights of its stages: 500 a step for 8 steps, then 750.
    stages = (Stage(256, 8000), Stage(256, weights=(0.25, 0.75)))
    assert until(Source("a", 0.5), Source("b", 0.5, 0.5), stages=stages) == (16, 1)
    stages = (Stage(256, 8000), Stage(256, weights=(1.0, 0.0)))
    assert until(Source("a", 0.5), Source("b", 0.5, 0.5), stages=stages) is None


def test_a_mixture_of_parts_without_documents_of_one_kind() -> None:
    class Part:
        def __init__(self, *lengths: int):
            self.lengths = np.array(lengths, np.int64)

    parts: Any = [Part(100_000), Part(3, 4)]
    groups, held_out = split_holdout(parts, 0)
    assert groups[1] == [Span(1, 0, 4), Span(2, 0, 5)] and held_out == []
    assert {span.document for span in groups[0]} == {0} and len(groups[0]) > 10

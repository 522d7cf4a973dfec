"""Generation over a cache, against recomputing the whole prefix for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import UserError
from moe_jax.inference.generation import Generator
from moe_jax.inference.sampling import Sampling
from moe_jax.models.language_model import LanguageModel

PROMPTS = [
    np.array([1, 2, 3]),
    np.array([5] * 9),
    np.array([7, 1, 1, 4, 4, 2]),
    np.array([11]),
    np.array([20, 3, 20, 3, 19]),
]
NEW, SLOTS, LENGTH = 12, 24, 24
MESHES = [{"fsdp": 1}, {"fsdp": 2, "expert": 2}]
LATENT, GROUPED = "latent", "grouped query, tied, routed alone"
CASES = [
    *[(LATENT, sizes) for sizes in MESHES],
    *[(GROUPED, sizes) for sizes in MESHES],
    ("latent, queries not compressed", MESHES[0]),
    ("dense", MESHES[1]),
]


def prompts_of(model: LanguageModel) -> list[np.ndarray]:
    return [prompt % model.config.vocab_size for prompt in PROMPTS]


@functools.cache
def recomputed(model: LanguageModel) -> list[list[int]]:
    """Greedy continuations, each token by a forward pass over all tokens before it."""
    rows = [list(prompt) for prompt in prompts_of(model)]
    for _ in range(NEW):
        tokens = np.full((len(rows), LENGTH), 2)  # what stands behind must not count
        for row, text in zip(tokens, rows, strict=True):
            row[: len(text)] = text
        logits = np.asarray(model(tokens))
        for row, text in enumerate(rows):
            text.append(int(np.argmax(logits[row, len(text) - 1])))
    return [text[len(prompt) :] for text, prompt in zip(rows, PROMPTS, strict=True)]


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_greedy_text_is_that_of_recomputing(make_model, name: str, sizes: dict[str, int]) -> None:
    expected = recomputed(make_model(name))
    assert len({token for text in expected for token in text}) > 8
    assert Generator(make_model(name, **sizes), slots=SLOTS)(PROMPTS, NEW) == expected


def _tokens_a_step(model: LanguageModel, text: list[int], prompt: np.ndarray) -> list[int]:
    """How many tokens each step must give: two where multi-token prediction over the whole text,
    as in training, has foreseen the second, until there are enough."""
    whole = np.array([[*prompt, *text]])

    @jax.jit
    def foreseen(parameters, router_bias, tokens):
        decoder = nnx.merge(model.graphdef, parameters, router_bias)
        inputs = (tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens) + jnp.arange(LENGTH))
        hidden, _ = decoder.hidden_states(*inputs)
        return decoder.logits(decoder.predict_ahead(hidden, *inputs).hidden_KBLD[0])

    tokens = model.place(np.pad(whole, [(0, 0), (0, LENGTH - whole.shape[1])]))
    with jax.set_mesh(model.mesh):
        logits = foreseen(model.parameters, model.router_bias, tokens)
    drafts = np.argmax(np.asarray(logits)[0], axis=-1)
    counts, last = [1], len(prompt)  # the place of the last token there is
    while sum(counts) < len(text):
        both = last + 1 < whole.shape[1] and drafts[last - 1] == whole[0, last + 1]
        counts.append(min(1 + both, len(text) - sum(counts)))
        last += counts[-1]
    return counts


@pytest.mark.parametrize(
    ("name", "sizes"), [("few words", sizes) for sizes in MESHES] + [(GROUPED, MESHES[0])], ids=str
)
def test_speculation_gives_the_same_text_in_fewer_steps(
    make_model, name: str, sizes: dict[str, int]
) -> None:
    model, one = make_model(name, **sizes), make_model(name)
    generation = Generator(model, slots=SLOTS, speculative=True).start(prompts_of(one), NEW)
    steps = list(generation)
    for row, (prompt, text) in enumerate(zip(prompts_of(one), recomputed(one), strict=True)):
        tokens = [step[row] for step in steps if step[row]]
        assert sum(tokens, []) == text
        assert [len(new) for new in tokens] == _tokens_a_step(one, text, prompt)
    pairs = sum(len(tokens) == 2 for step in steps for tokens in step)
    # A pair of which the second is one too many is accepted, and not shown.
    assert pairs <= generation.accepted <= pairs + len(PROMPTS)
    assert generation.drafted == sum(len(tokens) > 0 for step in steps[1:] for tokens in step)
    assert (pairs > 3) == (name == "few words")  # of grouped queries, all drafts are wrong


def test_a_perfect_drafter_is_always_believed(make_model) -> None:
    """Weights of zero everywhere but in embedding and head: the next token is the same again."""
    model = make_model("latent")
    zeros = jax.tree.map(lambda x: x * 0, model.parameters)
    table = np.eye(24, 16, dtype=np.float32)
    zeros["embedding"]["weight"] = zeros["embedding"]["weight"] + table
    zeros["head"]["weight"] = zeros["head"]["weight"] + table.T
    zeros["norm"] = model.parameters["norm"]
    for norm in ("embedding_norm", "hidden_norm", "norm"):
        zeros["mtp"][norm] = model.parameters["mtp"][norm]
    both = np.concatenate([np.eye(16), np.zeros((16, 16))])  # the embedding's half
    zeros["mtp"]["projection"]["weight"] = zeros["mtp"]["projection"]["weight"] + both
    copier = LanguageModel(model.config, model.precision, model.mesh, zeros, model.router_bias)
    generation = Generator(copier, slots=SLOTS, speculative=True).start([np.array([3])], 9)
    steps = list(generation)
    assert [tokens for (tokens,) in steps] == [[3]] + [[3, 3]] * 4
    assert (generation.drafted, generation.accepted) == (4, 4)


def test_rows_end_by_themselves(make_model) -> None:
    model = make_model()
    free = Generator(model, slots=SLOTS)(PROMPTS, NEW)
    end = free[0][3]
    ended = Generator(model, slots=SLOTS, end_ids=frozenset([end]))(PROMPTS, NEW)
    for text, whole in zip(ended, free, strict=True):
        assert text == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert {len(text) for text in ended} > {NEW}  # some ended early, some did not
    # The longest prompt ends with the cache, the others go on.
    generator = Generator(model, slots=12)
    assert [len(text) for text in generator(PROMPTS, NEW)] == [9, 3, 6, 11, 7]

    generation = generator.start(PROMPTS, NEW)
    lengths = np.zeros(len(PROMPTS), int)
    for new in generation:
        lengths += [len(tokens) for tokens in new]
        if lengths[4] == 2:
            generation.stop(4)
    assert lengths.tolist() == [9, 3, 6, 11, 2]


def test_draws_depend_on_seed_and_row_and_neither_on_other_rows_nor_on_the_mesh(make_model) -> None:
    drawn = Sampling(temperature=1.0)
    generator = Generator(make_model(), slots=SLOTS, sampling=drawn)
    texts = generator(PROMPTS, NEW, seed=3)
    on_mesh = Generator(make_model(**MESHES[1]), slots=SLOTS, sampling=drawn)
    assert on_mesh(PROMPTS, NEW, seed=3) == texts
    others = [PROMPTS[0], *PROMPTS[:1] * 3, PROMPTS[4]]
    again = generator(others, NEW, seed=3)
    assert (again[0], again[4]) == (texts[0], texts[4])
    assert len({tuple(text) for text in again[:4]}) == 4
    assert generator(PROMPTS, NEW, seed=4) != texts


def test_rows_that_have_ended_are_neither_kept_nor_routed(make_model) -> None:
    """Experts of no number show where tokens were sent."""
    model = make_model()
    broken = dict(model.parameters, moe_blocks=dict(model.parameters["moe_blocks"]))
    moe = dict(broken["moe_blocks"]["moe"])
    moe["down"] = moe["down"] * np.nan
    broken["moe_blocks"]["moe"] = moe
    generator = Generator(model, slots=SLOTS)
    generation = generator.start(PROMPTS, NEW)
    before = generation._cache
    active = np.array([1, 0, 1, 0, 0])
    steps, state = generator._steps, generation._state

    @jax.jit
    def run(parameters, active, state, cache):
        decoder = steps._decoder((parameters, model.router_bias))
        return decoder.decode(
            state.tokens_B[:, None], state.positions_B[:, None], active > 0, cache
        )

    with jax.set_mesh(model.mesh):
        hidden, after = run(broken, model.place(active), state, before)
    assert np.isnan(hidden).any(axis=(1, 2)).tolist() == (active > 0).tolist()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        changed = np.any(np.asarray(new) != np.asarray(old), axis=(0, *range(2, old.ndim)))
        assert changed.tolist() == (active > 0).tolist()


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([], "there is no prompt; give at least one"),
        ([np.array([], int)], "the prompt is empty; give at least one token"),
        (
            [PROMPTS[0], np.array([3, 24])],
            "prompt 2 has the token id 24; ids of this model are 0 to 23",
        ),
        ([np.array([-1])], "the prompt has the token id -1; ids of this model are 0 to 23"),
        (
            [np.zeros(SLOTS, int)],
            "the prompt has 24 tokens, and a cache of 24 must hold one more; "
            "shorten it or lengthen the cache",
        ),
    ],
)
def test_bad_prompts(make_model, prompts: list[np.ndarray], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Generator(make_model(), slots=SLOTS).start(prompts, NEW)
    assert str(error.value) == sentence


def test_speculation_where_it_cannot_be(make_model) -> None:
    with pytest.raises(UserError, match="temperature=0.5 must be 0 with it"):
        Generator(make_model(), slots=SLOTS, sampling=Sampling(0.5), speculative=True)
    model = make_model()
    config = dataclasses.replace(model.config, num_nextn_predict_layers=0)
    without = LanguageModel(config, model.precision, model.mesh, {}, {})
    with pytest.raises(UserError, match="this one has none"):
        Generator(without, slots=SLOTS, speculative=True)

"""A user's mistake is answered in one sentence with exit code 2; everything else is not hidden."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import app, flags
from absl.testing import flagsaver

from moe_jax import command_line
from moe_jax import main as program
from moe_jax.config import Config, UserError, field_names

ROOT = Path(command_line.__file__).parents[1]
TINY = "--config=configs/tiny.py"
Started = list[tuple[Config, Path]]
Start = Callable[..., Started]
# The flags library loads config files by a method that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Calls the training command with arguments; what it would train is returned."""
    started: Started = []
    monkeypatch.chdir(ROOT)
    # What app.run sets up once a process, logging and fault handling, is of no interest here.
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    monkeypatch.setattr(program.platform, "start", lambda *_: [])
    monkeypatch.setattr(
        program, "train", lambda config, workdir, _: started.append((config, workdir))
    )

    def run(*arguments: str) -> Started:
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        sys.modules.pop("config_config", None)  # it would be reloaded, with the old names in it
        try:
            command_line.run(program.main)
        except SystemExit:  # after training too, with the run's exit code
            if not started:
                raise
        return started

    with flagsaver.flagsaver():
        yield run


@pytest.fixture
def refusal(start: Start, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The sentence that the training command answers with."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            start(*arguments)
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
        return err.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config is missing; try --config=configs/tiny.py"),
        (["--config=missing.py"], "--config=missing.py: there is no such file"),
        (["--config", "missing.py"], "--config=missing.py: there is no such file"),
        (["--config=configs"], "--config=configs: there is no such file"),
        (["--config="], "--config=: there is no such file"),
        (["--config"], "Missing value for flag --config"),
        (
            ["--config.seed=1", TINY],
            "--config.seed must come after --config, as in --config=configs/tiny.py",
        ),
        (
            ["--config.seed=1"],
            "--config.seed must come after --config, as in --config=configs/tiny.py",
        ),
        (
            [TINY, "--config.training.num_step=5"],
            "config.training.num_step does not exist; did you mean config.training.num_steps?",
        ),
        (
            ["--config", "configs/tiny.py", "--config.model.moe.num_expert", "8"],
            "config.model.moe.num_expert does not exist; did you mean "
            "config.model.moe.num_experts?",
        ),
        (
            [TINY, "--config.modl.vocab_size=5"],
            "config.modl does not exist; did you mean config.model?",
        ),
        (
            [TINY, "--config.checkpoint.zzz=5"],
            "config.checkpoint.zzz does not exist; config.checkpoint has "
            f"{', '.join(field_names('config.checkpoint'))}",
        ),
        (
            [TINY, "--config.training.num_steps=many"],
            "flag --config.training.num_steps=many: invalid literal for int() with base 10: 'many'",
        ),
        (
            [TINY, "--config.model.attention.q_lora_rank=many"],
            "config.model.attention.q_lora_rank must be of type int or None, not 'many'",
        ),
        ([TINY, "--config.seed=-1"], "config.seed=-1 must be at least 0"),
        (
            [TINY, "--config.optimizer.eps=nan"],
            "config.optimizer.eps=nan must be a finite number",
        ),
        (
            [TINY, "--config.training=5"],
            "flag --config.training=5: Failed to parse '5' as a ConfigDict: `5` is not a dict.",
        ),
        (
            [TINY, "--config.data.stages=128"],
            "config.data.stages[0] must be a group of fields, not 128",
        ),
        (
            [TINY, "--config.data.stages=({'sequence_length': 128, 'until_token': 1}, {})"],
            "config.data.stages[0].until_token does not exist; did you mean "
            "config.data.stages[0].until_tokens?",
        ),
        ([TINY, "stray"], "'stray' is no flag; flags begin with --"),
        (["--workdri=x", TINY], "Unknown command line flag 'workdri'. Did you mean: workdir ?"),
        (
            [TINY, "--num_processes=two"],
            "flag --num_processes=two: invalid literal for int() with base 10: 'two'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(refusal: Callable[..., str], arguments: list[str], sentence: str) -> None:
    assert refusal(*arguments) == sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "config.training.num_stepz = 3",
            ':5: Key "num_stepz" does not exist and cannot be added since the config is locked. '
            'Did you mean "num_steps" instead of "num_stepz"?',
        ),
        (
            "config.training.num_steps = 3.5",
            ":5: Could not override field 'num_steps' (reference). 3.5 is of original type "
            "<class 'float'> and cannot be casted to type <class 'int'>",
        ),
        ("config.seed = seed", ":5: name 'seed' is not defined"),
        ("config.seed = int('x')", ":5: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_mistakes_in_a_config_file(
    refusal: Callable[..., str], tmp_path: Path, line: str, sentence: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from moe_jax.config import default_config\n\n"
        f"def get_config():\n    config = default_config()\n    {line}\n    return config\n"
    )
    assert refusal(f"--config={file}") == f"{file}{sentence}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config(:\n", "invalid syntax (mine.py, line 1)"),
        ("x = 1\n", "module 'config_config' has no attribute 'get_config'"),
        ("raise ZeroDivisionError('no')\n", "no"),
    ],
)
def test_a_file_that_is_no_config(
    refusal: Callable[..., str], tmp_path: Path, text: str, sentence: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    place = f"{file}:1: " if "raise" in text else f"--config={file}: "
    assert refusal(f"--config={file}") == place + sentence


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--config.seed=3"], "seed", 3),
        (["--config.seed=3", "--config.seed", "4"], "seed", 4),
        (["--config.optimizer.weight_decay=0"], "optimizer.weight_decay", 0.0),
        (["--config.data.mask_documents=false"], "data.mask_documents", False),
        (["--noconfig.data.mask_documents"], "data.mask_documents", False),
        (["--config.model.attention.q_lora_rank=None"], "model.attention.q_lora_rank", None),
        (["--config.model.attention.q_lora_rank=48"], "model.attention.q_lora_rank", 48),
        (["--config.training.stop_after_step=5"], "training.stop_after_step", 5),
        (
            ["--config.training.stop_after_step=5", "--config.training.stop_after_step=None"],
            "training.stop_after_step",
            None,
        ),
        (["--config.training.sample_prompt=None"], "training.sample_prompt", "None"),
        (["--config.profile.steps=3:5"], "profile.steps", "3:5"),
    ],
    ids=str,
)
def test_fields_from_the_command_line(
    start: Start, arguments: list[str], path: str, value: Any
) -> None:
    ((config, workdir),) = start(TINY, *arguments)
    assert _value(config, path) == value and type(_value(config, path)) is type(value)
    assert workdir == Path("runs/tiny")


def test_stages_from_the_command_line(start: Start) -> None:
    stages = "({'sequence_length': 128, 'until_tokens': 8192}, {'sequence_length': 256})"
    ((config, workdir),) = start(
        "--config", "configs/tiny.py", f"--config.data.stages={stages}", "--workdir=there"
    )
    assert [(stage.sequence_length, stage.until_tokens) for stage in config.data.stages] == [
        (128, 8192),
        (256, None),
    ]
    assert workdir == Path("there")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [TINY, "--help"]], ids=str)
def test_help_is_what_one_needs_in_80_columns(
    start: Start, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        start(*arguments)
    assert not exit.value.code
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) < 25 and max(map(len, lines)) <= 80
    assert "  python -m moe_jax.main --config=configs/tiny.py" in out
    flagged = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flagged[:2] == ["--config", "--workdir"]
    assert "--config.GROUP.FIELD=VALUE" in flagged and "--coordinator_address" in flagged


def test_only_the_users_mistakes_are_hidden(
    start: Start, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Callable[..., None]:
        def train(*_: Any) -> None:
            raise error

        return train

    monkeypatch.setattr(program, "train", fail(UserError("in one sentence")))
    assert refusal(TINY) == "in one sentence"
    flags.FLAGS.unparse_flags()
    monkeypatch.setattr(program, "train", fail(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        start(TINY)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_itself() -> None:
    done = _run("-m", "moe_jax.main", TINY, "--config.data.stagez=()")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: config.data.stagez does not exist; did you mean config.data.stages?\n"
    )
    done = _run("-m", "moe_jax.main", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Trains a model.\n\n  python -m moe_jax.main --config=")


def test_a_bug_keeps_its_traceback() -> None:
    done = _run(
        "-c",
        "from moe_jax import command_line\n"
        "def main(_):\n"
        "    raise ValueError('a bug')\n"
        "command_line.run(main)",
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("ValueError: a bug\n")

"""A hundred configs and thirty inputs that cannot run."""

import itertools
from collections.abc import Iterator
from pathlib import Path

# Fields with values that are refused, one at a time.
CONFIGS = {
    **dict.fromkeys(
        [
            *("model.vocab_size", "model.hidden_size", "model.num_hidden_layers"),
            *("model.intermediate_size", "model.max_position_embeddings"),
            *("model.attention.num_heads", "model.attention.kv_lora_rank"),
            *("model.attention.v_head_dim", "model.attention.qk_nope_head_dim"),
            *("model.moe.num_experts", "model.moe.num_experts_per_tok"),
            *("model.moe.intermediate_size", "model.moe.num_expert_groups"),
            *("training.tokens_per_step", "training.micro_batches", "training.num_steps"),
            *("training.log_every_steps", "training.eval_every_steps", "data.num_streams"),
            *("data.packing_bins", "checkpoint.every_steps", "checkpoint.keep"),
            *("checkpoint.max_failed_saves", "mesh.num_cpu_devices", "recovery.spike_window"),
        ],
        ("0", "-7"),
    ),
    **dict.fromkeys(
        [
            *("optimizer.weight_decay", "optimizer.eps", "optimizer.clip_norm"),
            *("optimizer.b1", "optimizer.b2", "model.moe.routed_scaling_factor"),
            *("checkpoint.every_minutes", "recovery.spike_sigmas", "recovery.watchdog_minutes"),
            *("collapse.max_violation", "collapse.min_entropy", "model.initializer_range"),
        ],
        ("-1.0", "nan"),
    ),
    "seed": ("-1", str(2**63)),
    "data.holdout_every": ("1", "-2"),
    "data.prefetch": ("-1",),
    "precision.compute_dtype": ("float16", "fp8"),
    "precision.recipe": ("fp4",),
    "precision.fp8_parts": ("attention,norm",),
    "model.attention.kind": ("linear",),
    "model.attention.qk_rope_head_dim": ("5",),
    "model.rope.scaling": ("longer",),
    "model.moe.scoring_func": ("tanh",),
    "model.moe.topk_method": ("random",),
    "model.moe.token_dropping": ("all",),
    "model.backends.attention": ("cuda", "tpu"),
    "training.rematerialization": ("some",),
    "training.stop_after_step": ("99",),
    "mesh.tensor": ("2",),
    "mesh.expert": ("3", "16"),
    "mesh.data": ("5",),
    "profile.steps": ("3", "4:2"),
    "data.stages": ("()", "({'sequence_length': 0},)", "({'sequence_length': 24},)"),
}
FLAGS = (
    ("--config.model.num_layer=3",),
    ("--config.training.steps=3",),
    ("--config.nothing=1",),
    ("--config.training.num_steps=many",),
    ("--config.training.num_steps=1.5",),
    ("--nothing=1",),
    ("something",),
    ("--coordinator_address=localhost:1",),
    ("--coordinator_address=nowhere", "--num_processes=2", "--process_id=0"),
    ("--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"),
)


def configs() -> list[list[str]]:
    """One hundred."""
    fields = [[f"--config.{name}={value}"] for name, values in CONFIGS.items() for value in values]
    return ([list(flags) for flags in FLAGS] + fields)[:100]


def all_of(source: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """("configs" or "inputs", further arguments), which override those of a run that works."""
    yield from (("configs", arguments) for arguments in configs())
    yield from (("inputs", arguments) for arguments in inputs(folder))


def inputs(folder: Path) -> list[list[str]]:
    """Thirty: corpora and checkpoints that are not there, or are not what they should be."""
    made = folder / "inputs"
    made.mkdir()
    contents = {
        "empty.txt": b"",
        "latin.txt": b"caf\xe9 " * 100,
        "binary.txt": bytes(range(256)) * 10,
        "utf16.txt": "text".encode("utf-16"),
        "cut.jsonl": b'{"text": "a"}\n{"text": "b',
        "list.jsonl": b'["a", "b"]\n',
        "number.jsonl": b"17\n",
        "field.jsonl": b'{"body": "a"}\n',
        "null.jsonl": b'{"text": null}\n',
        "integer.jsonl": b'{"text": 5}\n',
        "no_json.jsonl": b"just words\n",
        "latin.jsonl": b'{"text": "caf\xe9"}\n',
        "nested.jsonl": b'{"text": {"a": "b"}}\n',
        "empty.jsonl": b"",
        "one.txt": b"one text alone, and it is held out",
    }
    for name, content in contents.items():
        (made / name).write_bytes(content)
    (made / "folder.txt").mkdir()
    sources = [*(str(made / name) for name in contents if name != "one.txt")]
    sources += ["/nowhere/*.txt", str(made / "*.md"), str(made / "folder.txt"), "https://a/b.txt"]
    for name in ("a", "b"):
        (made / f"{name}.json").write_text("{}")
    weights = [made / "nothing", made / "empty", made / "broken", made / "cut"]
    for path in weights[1:]:
        path.mkdir()
    (weights[2] / "config.json").write_text("{")
    (weights[3] / "config.json").write_text("{}")
    occupied = made / "occupied"
    occupied.write_text("")
    found = [[f"--config.data.source={source}"] for source in sources]
    found += [[f"--config.training.init_from={path}"] for path in weights]
    found += [[f"--config={made / name}"] for name in ("no.py", "a.json", "folder.txt")]
    found += [[f"--workdir={occupied}"], [f"--workdir={occupied / 'run'}"]]
    bad = {
        "syntax.py": "def get_config(:\n",
        "raises.py": "def get_config():\n    return 1 / 0\n",
        "field.py": "from moe_jax.config import default_config\n\n\ndef get_config():\n"
        "    config = default_config()\n    config.model.num_expert = 3\n    return config\n",
    }
    for name, text in bad.items():
        (made / name).write_text(text)
        found.append([f"--config={made / name}"])
    return list(itertools.islice(found, 30))

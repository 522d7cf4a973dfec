"""The shape that train steps are compared at."""

SHAPE = dict(
    layers=4, dense_layers=1, dim=256, heads=4, q_lora=128, kv_lora=64, nope=32, rope=16, value=32,
    experts=16, top_k=4, shared=1, expert_ffn=128, dense_ffn=512, vocab=1024, length=512, batch=8,
)  # fmt: skip

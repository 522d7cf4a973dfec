"""The shape that train steps are compared at, and the operations that a step of it needs."""

SHAPE = dict(
    layers=4, dense_layers=1, dim=256, heads=4, q_lora=128, kv_lora=64, nope=32, rope=16, value=32,
    experts=16, top_k=4, shared=1, expert_ffn=128, dense_ffn=512, vocab=1024, length=512, batch=8,
)  # fmt: skip


def operations() -> float:
    """Of a step's products, forward and backward: each weight 6 times per token, attention's own.

    Attention counts the causal half. Nothing is recomputed.
    """
    s = SHAPE
    qk = s["nope"] + s["rope"]
    attention = (
        s["dim"] * s["q_lora"]
        + s["q_lora"] * s["heads"] * qk
        + s["dim"] * (s["kv_lora"] + s["rope"])
        + s["kv_lora"] * s["heads"] * (s["nope"] + s["value"])
        + s["heads"] * s["value"] * s["dim"]
    )
    scores = s["heads"] * (qk + s["value"]) * (s["length"] + 1) / 2
    routed = s["dim"] * (s["experts"] + 3 * (s["top_k"] + s["shared"]) * s["expert_ffn"])
    dense = 3 * s["dim"] * s["dense_ffn"]
    per_token = s["layers"] * (attention + scores)
    per_token += s["dense_layers"] * dense + (s["layers"] - s["dense_layers"]) * routed
    per_token += s["dim"] * s["vocab"]
    return 6.0 * per_token * s["batch"] * s["length"]

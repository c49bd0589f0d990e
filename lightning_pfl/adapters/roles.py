"""What a layer does inside its block, in one vocabulary for all model families.

A client's P and Q are mixed with those of layers in the same role, so ``self_attn.q_proj`` of a Llama and
``attention.self.query`` of a BERT must both be called ``q``. Start at `role_of`; `DEFAULT_ROLES` is the vocabulary, and
whoever needs another entry passes a mapping of their own, which is asked first.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DEFAULT_ROLES", "known_role", "role_of"]

DEFAULT_ROLES: Mapping[str, str] = {
    # attention
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "query": "q",
    "key": "k",
    "value": "v",
    "q": "q",
    "k": "k",
    "v": "v",
    "o": "o",
    "q_lin": "q",
    "k_lin": "k",
    "v_lin": "v",
    "out_lin": "o",
    "attention.output.dense": "o",
    "attention.dense": "o",
    "self_attention.dense": "o",
    "self_attn.dense": "o",
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "attn.proj": "o",
    "qkv": "qkv",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "EncDecAttention.q": "cross_q",
    "EncDecAttention.k": "cross_k",
    "EncDecAttention.v": "cross_v",
    "EncDecAttention.o": "cross_o",
    "encoder_attn.q_proj": "cross_q",
    "encoder_attn.k_proj": "cross_k",
    "encoder_attn.v_proj": "cross_v",
    "encoder_attn.out_proj": "cross_o",
    "crossattention.self.query": "cross_q",
    "crossattention.self.key": "cross_k",
    "crossattention.self.value": "cross_v",
    "crossattention.output.dense": "cross_o",
    "crossattention.q_attn": "cross_q",
    "crossattention.c_attn": "cross_kv",
    "crossattention.c_proj": "cross_o",
    # gated feed-forward: down(act(gate(x)) * up(x))
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "wi_0": "gate",
    "wi_1": "up",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    # plain feed-forward: fc2(act(fc1(x)))
    "fc1": "fc1",
    "fc2": "fc2",
    "lin1": "fc1",
    "lin2": "fc2",
    "linear1": "fc1",
    "linear2": "fc2",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "dense_h_to_4h": "fc1",
    "dense_4h_to_h": "fc2",
    "wi": "fc1",
    "wo": "fc2",
    "pwconv1": "fc1",
    "pwconv2": "fc2",
    # convolutions of a residual branch, in their order; the branch around them; squeeze and excitation
    "conv1": "conv1",
    "conv2": "conv2",
    "conv3": "conv3",
    "layer.0.convolution": "conv1",
    "layer.1.convolution": "conv2",
    "layer.2.convolution": "conv3",
    "shortcut": "shortcut",
    "shortcut.0": "shortcut",
    "shortcut.convolution": "shortcut",
    "downsample.0": "shortcut",
    "downsample.conv": "shortcut",
    "se.conv_reduce": "squeeze",
    "se.conv_expand": "excite",
    "squeeze_excite.reduce": "squeeze",
    "squeeze_excite.expand": "excite",
    # a block that is wide inside: project(excite(depthwise(expand(x))))
    "expand_conv": "expand",
    "project_conv": "project",
    "expand_1x1.convolution": "expand",
    "reduce_1x1.convolution": "project",
    "conv_pw": "expand",
    "conv_pwl": "project",
}
"""The end of a layer's path inside its block, and its role; of several that fit, the longest counts."""


def role_of(path: str, roles: Mapping[str, str] | None = None) -> str:
    """The role of a layer.

    Args:
        path: the layer's path inside its block, dotted; empty when the block is the layer.
        roles: ends of paths and their roles, asked before `DEFAULT_ROLES`.

    Returns:
        The mapped role; for a path that no entry fits, its last word that is not a number (such a layer finds partners
        only among models that use the same word), and ``"linear"`` when there is none.

    Example:
        >>> role_of("attention.self.query"), role_of("attention.output.dense"), role_of("output.dense")
        ('q', 'o', 'fc2')
        >>> role_of("mixer.in_proj"), role_of("mixer.in_proj", {"mixer.in_proj": "qkv"}), role_of("")
        ('in_proj', 'qkv', 'linear')
    """
    role = known_role(path, roles)
    return role or next((word for word in reversed(path.split(".")) if word and not word.isdigit()), "linear")


def known_role(path: str, roles: Mapping[str, str] | None = None) -> str | None:
    """The role of a layer that some entry names, else None: models that use other words have no partner for it.

    Args:
        path: the layer's path inside its block, dotted; empty when the block is the layer.
        roles: ends of paths and their roles, asked before `DEFAULT_ROLES`.

    Example:
        >>> known_role("layer.1.convolution"), known_role("mixer.in_proj")
        ('conv2', None)
    """
    words = path.split(".")
    for known in (roles or {}, DEFAULT_ROLES):
        for start in range(len(words)):  # the longest end first
            role = known.get(".".join(words[start:]))
            if role is not None:
                return role
    return None

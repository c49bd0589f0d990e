"""Promises of `lightning_pfl.adapters.roles`."""

from __future__ import annotations

import pytest

from lightning_pfl.adapters.roles import role_of


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("self_attn.q_proj", "q"),
        ("attention.self.query", "q"),
        ("attention.output.dense", "o"),
        ("output.dense", "fc2"),
        ("attn.c_proj", "o"),
        ("mlp.c_proj", "fc2"),
        ("layer.1.EncDecAttention.q", "cross_q"),
        ("layer.0.SelfAttention.q", "q"),
        ("mixer.7", "mixer"),
        ("", "linear"),
    ],
)
def test_the_longest_known_end_of_a_path_is_its_role(path, role):
    assert role_of(path) == role


def test_a_users_role_goes_before_the_built_in_one():
    assert role_of("self_attn.q_proj", {"q_proj": "query"}) == "query"
    assert role_of("self_attn.k_proj", {"q_proj": "query"}) == "k"

"""Block hashes and the compatibility hash."""

from tandem_wire.handoff import KVLayout
from tandem_wire.hashing import block_hash, compatibility_hash, prefix_hashes, salt_hash


def test_prefix_hashes_are_chained() -> None:
    salt = salt_hash("model", "revision")
    tokens = list(range(10))
    hashes = prefix_hashes(tokens, 4, salt)
    assert len(hashes) == 2
    assert hashes[1] == block_hash(hashes[0], tokens[4:8])
    assert prefix_hashes([9, *tokens[1:]], 4, salt)[1] != hashes[1]
    assert prefix_hashes(tokens, 4, salt_hash("model", "other")) != hashes


def test_salt_parts_do_not_run_together() -> None:
    assert salt_hash("ab", "c") != salt_hash("a", "bc")


def test_compatibility_hash_covers_every_fact_in_any_order() -> None:
    layout = KVLayout(
        num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, dtype="float32", itemsize=4
    )
    assert (layout.page_bytes, layout.block_bytes) == (128, 512)
    one = compatibility_hash(model="m", layout=layout)
    assert one == compatibility_hash(layout=layout, model="m")
    assert one != compatibility_hash(model="n", layout=layout)
    assert len(one) == 16
    latents = KVLayout(
        num_layers=2,
        num_kv_heads=1,
        head_dim=8,
        page_size=4,
        dtype="float32",
        itemsize=4,
        num_planes=1,
    )
    assert (latents.page_bytes, latents.layer_bytes, latents.block_bytes) == (128, 128, 256)
    assert one != compatibility_hash(model="m", layout=latents)

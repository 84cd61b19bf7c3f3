"""The block that is imported, and how sources that do not fit are refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fwl_export.errors import CheckpointError, ConfigError, FwlError
from fwl_export.importers import import_block, with_backbone
from fwl_export.model.checkpoint import load_checkpoint
from tests.bundles import VOCABULARY, write_checkpoint

DATA = Path(__file__).parents[1] / "data"
Tree = dict[str, np.ndarray]


def jax_tree(d: int = 16, h: int = 12, s: int = 4, v: int = VOCABULARY) -> Tree:
    rng = np.random.default_rng(0)
    shapes = {
        "layers_0/Dense_0/kernel": (d, h),
        "layers_0/Dense_0/bias": (h,),
        "layers_2/Dense_0/kernel": (h, s),
        "layers_2/Dense_0/bias": (s,),
        "layers_3/LayerNorm_0/scale": (s,),
        "layers_3/LayerNorm_0/bias": (s,),
        "unembed/kernel": (s, v),
        "unembed/bias": (v,),
        **{f"step_size_{i}": () for i in range(4)},
    }
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def write(path: Path, tree: Tree, prefix: str = "") -> Path:
    np.savez(path, **{prefix + name: array for name, array in tree.items()})
    return path


def fails(path: Path, message: str, kind: type[FwlError] = CheckpointError, **options) -> None:
    with pytest.raises(kind, match=re.escape(message)) as info:
        import_block("jax", path, **{"loss_normalizer": 4.0, **options})
    assert "\n" not in str(info.value)


def test_both_variants_have_their_settings() -> None:
    jax = import_block("jax", DATA / "importers/jax.msgpack", 40).config
    assert (jax.input_size, jax.hidden_size, jax.output_size) == (6, 20, 5)
    assert (jax.update_dense_bias, jax.step_sizes) == (False, "per_layer")
    assert (jax.norm_epsilon, jax.loss_normalizer, jax.decay) == (1e-6, 40.0, "none")
    tf = import_block("tf", DATA / "importers/tf_checkpoint", 30, norm_epsilon=1e-3).config
    assert (tf.update_dense_bias, tf.step_sizes) == (True, "per_tensor")
    assert (tf.norm_epsilon, tf.loss_normalizer, tf.decay) == (1e-3, 30.0, "none")


def test_a_missing_loss_normalizer_says_what_it_is_and_how_to_find_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", jax_tree())
    fails(path, "divides the loss by the sum of the token weights", loss_normalizer=None)
    fails(path, "which the checkpoint does not hold. Give that sum", loss_normalizer=None)
    fails(path, "8 x 511 = 4088", loss_normalizer=None)
    fails(path, "loss_normalizer is 0.0; expected more than 0", ConfigError, loss_normalizer=0)


def test_the_block_is_found_wherever_it_is(tmp_path: Path) -> None:
    tree = jax_tree()
    rest = {
        "params/embed/kernel": np.zeros(3),
        "opt_state/0/mu/layers_0/Dense_0/kernel": np.ones(2),
    }
    np.savez(tmp_path / "a.npz", **{f"params/model/fwl/{n}": a for n, a in tree.items()}, **rest)
    block = import_block("jax", tmp_path / "a.npz", 4.0)
    np.testing.assert_array_equal(block.tensors["unembed"], tree["unembed/kernel"].T)
    np.testing.assert_array_equal(block.tensors["steps.down"], tree["step_size_2"])


def test_a_prefix_chooses_one_of_several_blocks(tmp_path: Path) -> None:
    first, second = jax_tree(), jax_tree(h=10)
    trees = {"a/": first, "b/": second}
    np.savez(tmp_path / "a.npz", **{p + n: a for p, tree in trees.items() for n, a in tree.items()})
    fails(tmp_path / "a.npz", "has several blocks, at 'a' and 'b'; choose one of these")
    assert import_block("jax", tmp_path / "a.npz", 4.0, prefix="b").config.hidden_size == 10
    fails(tmp_path / "a.npz", "has no block of the paper's JAX code under 'c'", prefix="c")


def test_without_an_unembedding(tmp_path: Path) -> None:
    tree = {n: a for n, a in jax_tree().items() if not n.startswith("unembed")}
    block = import_block("jax", write(tmp_path / "a.npz", tree), 4.0)
    assert block.vocab_size is None
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match="has no unembedding, but the backbone's vocabulary"):
        with_backbone(block, checkpoint)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers_2/Dense_0/kernel", np.zeros((13, 4)), "has shape [13, 4]; expected [12, any]"),
        ("layers_2/Dense_0/kernel", np.zeros((13, 4)), "expected [12, any], from the block's"),
        ("layers_0/Dense_0/bias", np.zeros((8, 12)), "has shape [8, 12]"),
        ("unembed/bias", np.zeros(65), "expected [64]"),
        ("step_size_3", np.zeros(2), "has shape [2]; expected [], from the block's other arrays"),
        ("step_size_0", np.float32("nan"), "'step_size_0' holds NaN or infinite values"),
        ("layers_0/Dense_0/kernel", np.full((16, 12), np.inf), "holds NaN or infinite values"),
        ("unembed/kernel", np.zeros((4, 64), complex), "has type complex128; expected real"),
        ("layers_3/LayerNorm_0/scale", None, "lacks 'layers_3/LayerNorm_0/scale' of"),
        ("unembed/bias", None, "lacks 'unembed/bias' of the same block"),
        ("layers_0/Dense_0/kernel", None, "has a path that ends with 'layers_0/Dense_0/kernel'"),
        ("layers_0/Dense_0/kernel", np.zeros((0, 12)), "is empty"),
    ],
)
def test_a_tree_that_does_not_fit(
    tmp_path: Path, name: str, value: np.ndarray | None, message: str
) -> None:
    tree = {n: a for n, a in {**jax_tree(), name: value}.items() if a is not None}
    fails(write(tmp_path / "a.npz", tree), message)


def test_the_other_framework_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has no block of the paper's TensorFlow code"):
        import_block("tf", DATA / "fwl_reference_jax.npz", 4.0)


def test_on_a_backbone(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    block = import_block("jax", write(tmp_path / "a.npz", jax_tree()), 4.0)
    model = with_backbone(block, checkpoint)
    ids = torch.arange(12)[None]
    assert torch.equal(model.backbone(ids), checkpoint.model.backbone(ids))
    assert torch.equal(model.fast_weights.down_kernel, block.tensors["down_kernel"])
    fast, slow = model(ids, ids + 1)
    assert not torch.allclose(fast, slow)
    narrow = import_block("jax", write(tmp_path / "b.npz", jax_tree(d=8)), 4.0)
    with pytest.raises(ConfigError, match="input_size is 8, but the backbone's width is 16"):
        with_backbone(narrow, checkpoint)
    other = import_block("jax", write(tmp_path / "c.npz", jax_tree(v=63)), 4.0)
    with pytest.raises(
        CheckpointError, match="unembedding of 63 tokens, but the backbone's vocabulary has 64"
    ):
        with_backbone(other, checkpoint)

"""Every fast path against its plain twin, and the plain twins against loops in numpy."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)


def close(got, want, tolerance=2e-5, floor=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b)) + floor))


def both(f, *args):
    """Value and all gradients of sum(sin(f))."""
    g = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=tuple(range(len(args))))
    return jax.jit(g)(*args)


def segments(kind, B, S):
    return {"one": jnp.ones((B, S), jnp.int32),
            "documents": jnp.cumsum(jnp.asarray(rng.random((B, S)) < 0.1), axis=1).astype(jnp.int32),
            "padded": jnp.where(jnp.arange(S) < S // 2, 1, 0) * jnp.ones((B, 1), jnp.int32)}[kind]


@pytest.mark.parametrize("S, N, M, window, kind", [
    (96, 4, 2, 96, "one"), (96, 4, 1, 40, "documents"), (130, 2, 2, 1, "one"), (130, 2, 1, 130, "padded"),
    (7, 3, 1, 3, "documents"), (65, 2, 1, 64, "padded")])
def test_chunked_attention_is_plain_attention(S, N, M, window, kind):
    q, k, v, seg = normal(2, S, N, 8), normal(2, S, M, 8), normal(2, S, M, 8), segments(kind, 2, S)
    close(both(lambda *a: kernels.attention(*a, seg, window, "chunked"), q, k, v),
          both(lambda *a: kernels.attention(*a, seg, window, "plain"), q, k, v),
          floor=0.1)        # values are about 1; with a window of one, dq and dk are 0 but for rounding


def test_plain_attention_is_a_loop():
    S, N, M, H, window = 17, 4, 2, 8, 5
    q, k, v = np.asarray(normal(1, S, N, H)), np.asarray(normal(1, S, M, H)), np.asarray(normal(1, S, M, H))
    seg = np.asarray(segments("documents", 1, S))
    want = np.zeros((1, S, N, H))
    for n in range(N):
        for i in range(S):
            js = [j for j in range(S) if 0 <= i - j < window and seg[0, i] == seg[0, j]]
            score = np.array([q[0, i, n] @ k[0, j, n // (N // M)] for j in js]) / np.sqrt(H)
            weight = np.exp(score - score.max())
            want[0, i, n] = (weight / weight.sum()) @ np.stack([v[0, j, n // (N // M)] for j in js])
    close(kernels.attention(q, k, v, seg, window, "plain"), want)


@pytest.mark.parametrize("T, chunk", [(64, 16), (50, 16), (10, 16), (17, 1)])
def test_chunked_cross_entropy_is_plain_cross_entropy(T, chunk):
    x, head, target = normal(T, 12), normal(12, 33), jnp.asarray(rng.integers(0, 33, T))
    for part in (0, 1):
        close(both(lambda x, h: kernels.cross_entropy(x, h, target, "chunked", chunk=chunk)[part], x, head),
              both(lambda x, h: kernels.cross_entropy(x, h, target, "plain")[part], x, head))


def test_plain_cross_entropy_is_log_softmax():
    x, head, target = normal(9, 12), normal(12, 33), np.arange(9)
    logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    nll, got_lse = kernels.cross_entropy(x, head, jnp.asarray(target), "plain")
    close((nll, got_lse), (lse - logits[np.arange(9), target], lse))


@pytest.mark.parametrize("tiles", [[0, 0, 1, 3], [2, 2, 2, 2], [0, 1, 2, 3], [3]])
def test_grouped_matmul_is_every_expert_then_choose(tiles):
    x, w, tile_expert = normal(8 * len(tiles), 6), normal(4, 6, 5), jnp.asarray(tiles, jnp.int32)
    close(both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, "tiles"), x, w),
          both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, "plain"), x, w))


def test_an_unknown_implementation_is_an_error():
    x = normal(1, 4, 2, 8)
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.attention(x, x, x, jnp.ones((1, 4), int), 4, "fast")
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.cross_entropy(normal(4, 2), normal(2, 3), jnp.zeros(4, int), "fast")
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.grouped_matmul(normal(4, 2), normal(1, 2, 3), jnp.zeros(1, int), "fast")

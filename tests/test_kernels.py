"""Every fast path against its plain twin, and the plain twins against loops in numpy."""
from functools import partial

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
    """Value of f, all gradients of sum(sin(f)). Not the sum: it may cancel, and then rounding looks large."""
    def total(*a):
        y = f(*a)
        return jnp.sum(jnp.sin(y)), y
    gradients, value = jax.jit(jax.grad(total, argnums=tuple(range(len(args))), has_aux=True))(*args)
    return value, gradients


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


@pytest.mark.parametrize("impl", ["splash", "cudnn"])        # splash interpreted; cudnn's arguments, on XLA
@pytest.mark.parametrize("window", [100, pytest.param(256, marks=pytest.mark.slow)])
def test_borrowed_attention_is_plain_attention(impl, window):
    q, k, v = normal(1, 256, 4, 128), normal(1, 256, 2, 128), normal(1, 256, 2, 128)
    seg = segments("documents", 1, 256)
    close(both(lambda *a: kernels.attention(*a, seg, window, impl), q, k, v),
          both(lambda *a: kernels.attention(*a, seg, window, "plain"), q, k, v))


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


@pytest.mark.parametrize("impl, T, chunk", [("chunked", 64, 16), ("chunked", 50, 16), ("chunked", 10, 16),
                                            ("chunked", 17, 1), ("vocabulary", 50, 11), ("vocabulary", 50, 16),
                                            ("vocabulary", 9, 32), ("vocabulary", 9, 40)])
def test_cross_entropy_in_pieces_is_plain_cross_entropy(impl, T, chunk):
    """Pieces that divide their axis, that do not, and one piece; V = 33. Loss and normaliser (the z-loss's)."""
    x, head, target = normal(T, 12), normal(12, 33), jnp.asarray(rng.integers(0, 33, T)).at[-1].set(32)
    for part in (0, 1):
        close(both(lambda x, h: kernels.cross_entropy(x, h, target, impl, chunk=chunk)[part], x, head),
              both(lambda x, h: kernels.cross_entropy(x, h, target, "plain")[part], x, head))


def test_vocabulary_blocks_survive_large_logits():
    x, head, target = jnp.full((4, 2), 300.0), jnp.asarray([[-1.0] * 7 + [1.0]] * 2), jnp.full(4, 7)
    nll, lse = kernels.cross_entropy(x, head, target, "vocabulary", chunk=3)
    assert np.asarray(nll).tolist() == [0.0] * 4 and np.asarray(lse).tolist() == [600.0] * 4


def test_plain_cross_entropy_is_log_softmax():
    x, head, target = normal(9, 12), normal(12, 33), np.arange(9)
    logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    nll, got_lse = kernels.cross_entropy(x, head, jnp.asarray(target), "plain")
    close((nll, got_lse), (lse - logits[np.arange(9), target], lse))


TILES = [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 3, 4], [0, 1, 1, 1, 1, 2, 3, 4, 4]]       # of 4 experts; 4 is nobody


def rows_of(tiles, r, D):
    """Rows for these tiles, nobody's rows zero as dispatch leaves them, and the tiles as an array."""
    x = normal(r * len(tiles), D)
    return x * (jnp.repeat(jnp.asarray(tiles), r) < 4)[:, None], jnp.asarray(tiles, jnp.int32)


@pytest.mark.parametrize("impl", ["tiles", "pallas_tpu", "ragged_dot"])
@pytest.mark.parametrize("tiles", TILES)
def test_grouped_matmul_is_every_expert_then_choose(tiles, impl):
    (x, tile_expert), w = rows_of(tiles, 8, 6), normal(4, 6, 5)
    close(both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, impl), x, w),
          both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, "plain"), x, w))


def test_the_tpu_kernels_add_up_over_several_blocks():
    """Both widths span several blocks: the sums in the scratch memory start and end where they should."""
    D, F = 3 * 640, 768
    blocks = [kernels._axis_block(size, most, jnp.float32, "") for size, most in ((D, 1280), (F, 1280), (F, 640))]
    assert blocks == [640, 384, 256]
    (x, tile_expert), w = rows_of([0, 0, 1, 2, 3, 4], 8, D), normal(4, D, F) * D**-0.5
    close(both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, "pallas_tpu"), x, w),
          both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, "plain"), x, w))


def test_the_tpu_kernels_write_every_element():
    """Memory that nobody wrote is NaN here, as it is garbage on a device: no expert and no row may be left out."""
    from jax.experimental.pallas import tpu as pltpu
    (x, tile_expert), w = rows_of([0, 1, 2, 2, 2, 3, 4, 4], 8, 16), normal(4, 16, 24)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, "pallas_tpu", "tpu"), x, w)
    close(got, both(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, "plain"), x, w))


def test_widths_that_blocks_do_not_divide_are_refused():
    (x, tile_expert), w = rows_of([0, 1, 2, 3], 8, 2600), normal(4, 2600, 128)
    with pytest.raises(ValueError, match="expected a multiple of 128, found 2600"):
        kernels.grouped_matmul(x, w, tile_expert, "pallas_tpu")


@pytest.mark.parametrize("impl", ["loop", "tiles", "pallas_tpu"])
@pytest.mark.parametrize("tiles", TILES)
def test_experts_are_three_grouped_matmuls(tiles, impl):
    x, tile_expert = rows_of(tiles, 8, 12)
    gate, up, down = normal(4, 12, 10), normal(4, 12, 10), normal(4, 10, 12)
    close(both(lambda *a: kernels.experts(*a, tile_expert, impl), x, gate, up, down),
          both(lambda *a: kernels.experts(*a, tile_expert, "plain"), x, gate, up, down), 1e-4)


@pytest.mark.parametrize("shape, candidates", [((2, 64, 8), 5), ((1, 2048, 4), 15), ((3, 40, 6), 1)])
def test_counting_several_candidates_at_once(shape, candidates):
    L, T, E = shape
    whole = lambda *shape: jnp.asarray(rng.integers(0, 2**32, shape, np.uint32))
    key = whole(L, T, E).at[0, 0].set(0).at[0, 1].set(2**32 - 1)
    tried = whole(candidates, L, E).at[0, 0].set(key[0, 2])                      # ">=": equal keys count
    got = kernels.count_reaching(key, tried, "pallas_tpu")
    assert (got == kernels.count_reaching(key, tried, "plain")).all()
    assert (got == np.sum(np.asarray(key) >= np.asarray(tried)[:, :, None], axis=2)).all()


def test_balancing_with_the_tpu_kernel_is_balancing():
    """What train.py does on a TPU, four bits a round with the kernel (interpreted here), gives the same bias."""
    import balance
    import model
    margin, valid = normal(3, 200, 6), jnp.asarray(rng.random(200) < 0.8)
    bias = normal(3, 6)
    plain = balance.update("quantile", margin, valid, bias, 2)
    kernel = partial(kernels.count_reaching, impl="pallas_tpu")
    assert (balance.update("quantile", margin, valid, bias, 2, count=kernel, bits=4)[0] == plain[0]).all()
    here = balance.update("quantile", margin, valid, bias, 2, None, 0.0, *model.counting("cpu"))
    assert (here[0] == plain[0]).all()
    assert model.counting("tpu")[1] == 4 and kernels.best("tpu").count == "pallas_tpu"


def test_an_unknown_implementation_is_an_error():
    x = normal(1, 4, 2, 8)
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.attention(x, x, x, jnp.ones((1, 4), int), 4, "fast")
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.cross_entropy(normal(4, 2), normal(2, 3), jnp.zeros(4, int), "fast")
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.grouped_matmul(normal(4, 2), normal(1, 2, 3), jnp.zeros(1, int), "fast")
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.experts(normal(4, 2), *[normal(1, 2, 2)] * 3, jnp.zeros(1, int), "fast")
    with pytest.raises(ValueError, match="impl='fast'"):
        kernels.count_reaching(jnp.zeros((1, 2, 2), jnp.uint32), jnp.zeros((1, 1, 2), jnp.uint32), "fast")
    with pytest.raises(ValueError, match="platform='vax': expected one of 'cpu', 'tpu', 'gpu'"):
        kernels.attention(x, x, x, jnp.ones((1, 4), int), 4, platform="vax")


@pytest.mark.parametrize("chip", kernels.CHIPS)
def test_the_roofline_counts_what_the_model_counts(chip):
    """Model FLOPs of a layer's scores, its experts and the head, per token, are those of model.count."""
    import model
    c = model.ModelConfig(vocab_size=128_256, seq_len=4096, hidden_dim=5120, num_layers=1, num_heads=40,
                          num_kv_heads=10, head_dim=128, shared_dim=5120, num_experts=64, experts_per_token=4,
                          expert_dim=2560)
    rows = {name: flops for name, flops, *_ in kernels.roofline(chip)}
    D, S = c.hidden_dim, c.seq_len
    rest = 6 * D * 5120 + 2 * D * 128 * (40 + 20) + 2 * 40 * 128 * D + 3 * S * 40 + 2 * D * 64      # not kernels
    experts = rows["experts, gate and up"] + rows["experts, down"]
    ours = rows["attention, full"] + experts + rows["loss over 128,256 words"]
    assert ours / 16_384 + 3 * rest == model.count(c).mfu_flops
    for _, model_flops, in_view, executed, size in kernels.roofline(chip):
        assert in_view <= model_flops and size > 0 and executed > 0.8 * in_view

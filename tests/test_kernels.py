"""Every fast implementation against its plain twin, and the plain twins against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels


def both(f, *args):
    """The value of f and the gradients of sum(sin(f)) with respect to all arguments.

    Not of the sum: it may cancel, and then rounding looks large."""
    def total(*a):
        y = f(*a)
        return jnp.sum(jnp.sin(y)), y
    wrt = tuple(range(len(args)))
    gradients, value = jax.jit(jax.grad(total, argnums=wrt, has_aux=True))(*args)
    return value, gradients


def segments(kind, B, S, rng):
    if kind == "one":
        return jnp.ones((B, S), jnp.int32)
    if kind == "padded":
        return jnp.where(jnp.arange(S) < S // 2, 1, 0) * jnp.ones((B, 1), jnp.int32)
    return jnp.cumsum(jnp.asarray(rng.random((B, S)) < 0.1), axis=1).astype(jnp.int32)


# --------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize("S, N, M, window, kind", [
    (96, 4, 2, 96, "one"),
    (96, 4, 1, 40, "documents"),
    (130, 2, 2, 1, "one"),
    (130, 2, 1, 130, "padded"),
    (7, 3, 1, 3, "documents"),
    (65, 2, 1, 64, "padded")])
def test_chunked_attention_equals_plain_attention(S, N, M, window, kind, rng, normal, close):
    q, k, v = normal(2, S, N, 8), normal(2, S, M, 8), normal(2, S, M, 8)
    segment_BS = segments(kind, 2, S, rng)

    def run(impl):
        return both(lambda *a: kernels.attention(*a, segment_BS, window, impl), q, k, v)
    # values are about 1; with a window of one, dq and dk are 0 but for rounding
    close(run("chunked"), run("plain"), floor=0.1)


@pytest.mark.parametrize("window", [100, pytest.param(256, marks=pytest.mark.slow)])
def test_splash_attention_equals_plain_attention(window, rng, normal, close):
    """JAX's TPU kernel in interpret mode."""
    q, k, v = normal(1, 256, 4, 128), normal(1, 256, 2, 128), normal(1, 256, 2, 128)
    segment_BS = segments("documents", 1, 256, rng)

    def run(impl):
        return both(lambda *a: kernels.attention(*a, segment_BS, window, impl), q, k, v)
    close(run("splash"), run("plain"))


def test_plain_attention_equals_a_loop_in_numpy(rng, normal, close):
    S, N, M, H, window = 17, 4, 2, 8, 5
    q, k, v = (np.asarray(normal(1, S, heads, H)) for heads in (N, M, M))
    segment_BS = np.asarray(segments("documents", 1, S, rng))
    want = np.zeros((1, S, N, H))
    for n in range(N):
        m = n // (N // M)
        for i in range(S):
            seen = [j for j in range(S)
                    if 0 <= i - j < window and segment_BS[0, i] == segment_BS[0, j]]
            score = np.array([q[0, i, n] @ k[0, j, m] for j in seen]) / np.sqrt(H)
            weight = np.exp(score - score.max())
            values = np.stack([v[0, j, m] for j in seen])
            want[0, i, n] = (weight / weight.sum()) @ values
    close(kernels.attention(q, k, v, segment_BS, window, "plain"), want)


# ----------------------------------------------------------------------------------- cross-entropy

@pytest.mark.parametrize("T, chunk", [(50, 11), (50, 16), (9, 32)])
def test_cross_entropy_by_vocabulary_equals_plain(T, chunk, rng, normal, close):
    """Chunks that divide V = 33 and that do not. Loss and normalizer (the z-loss's)."""
    x, head = normal(T, 12), normal(12, 33)
    target_T = jnp.asarray(rng.integers(0, 33, T)).at[-1].set(32)

    def run(impl, part):
        return both(lambda x, h: kernels.cross_entropy(x, h, target_T, impl, chunk=chunk)[part],
                    x, head)
    for part in (0, 1):
        close(run("vocabulary", part), run("plain", part))


def test_cross_entropy_by_vocabulary_survives_large_logits():
    x, target_T = jnp.full((4, 2), 300.0), jnp.full(4, 7)
    head = jnp.asarray([[-1.0] * 7 + [1.0]] * 2)
    nll, lse = kernels.cross_entropy(x, head, target_T, "vocabulary", chunk=3)
    assert np.asarray(nll).tolist() == [0.0] * 4
    assert np.asarray(lse).tolist() == [600.0] * 4


def test_plain_cross_entropy_is_log_softmax_in_numpy(normal, close):
    x, head, target_T = normal(9, 12), normal(12, 33), np.arange(9)
    logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    nll, got_lse = kernels.cross_entropy(x, head, jnp.asarray(target_T), "plain")
    close((nll, got_lse), (lse - logits[np.arange(9), target_T], lse))


def test_the_default_cross_entropy_never_holds_more_logits_than_its_limit():
    """Shapes only: 16,384 tokens of the 129B vocabulary would be 2.1 billion logits."""
    D = 64

    def largest(T, V=128_256):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((T, D), (D, V))]
        target = jax.ShapeDtypeStruct((T,), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda *a: kernels.cross_entropy(*a)[0])(*shapes, target)
        return max(v.aval.size for eqn in jax.tree.leaves(list(_equations(jaxpr.jaxpr)))
                   for v in eqn.outvars)
    assert largest(64) == 64 * 128_256, "few tokens: all logits at once"
    for sizes in ((16_384,), (131_072,), (131_072, 4096)):
        assert largest(*sizes) <= kernels.PLAIN_LOGITS


def _equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _equations(getattr(inner, "jaxpr", inner))


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


# ---------------------------------------------------------------------- grouped matmul and experts

# of 4 experts; 4 is a tile without an owner
TILES = [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 3, 4], [0, 1, 1, 1, 1, 2, 3, 4, 4]]


@pytest.fixture
def rows_of(normal):
    """rows_of(tiles, r, D): r rows a tile, zero where nobody owns it, as moe.dispatch leaves them;
    and the tiles as an array."""
    def rows(tiles, r, D):
        owned = jnp.repeat(jnp.asarray(tiles), r) < 4
        return normal(r * len(tiles), D) * owned[:, None], jnp.asarray(tiles, jnp.int32)
    return rows


def multiply(impl, tile_expert, platform="cpu"):
    return lambda x, w: kernels.grouped_matmul(x, w, tile_expert, impl, platform)


@pytest.mark.parametrize("impl", ["tiles", "pallas_tpu"])
@pytest.mark.parametrize("tiles", TILES)
def test_grouped_matmul_equals_every_expert_then_select(tiles, impl, rows_of, normal, close):
    (x, tile_expert), w = rows_of(tiles, 8, 6), normal(4, 6, 5)
    close(both(multiply(impl, tile_expert), x, w), both(multiply("plain", tile_expert), x, w))


def test_plain_grouped_matmul_multiplies_by_the_owner(rows_of, normal, close):
    (x, tile_expert), w = rows_of(TILES[1], 8, 6), np.asarray(normal(4, 6, 5))
    want = [row @ w[e] if e < 4 else 0 * w[0, 0]
            for row, e in zip(np.asarray(x), np.repeat(TILES[1], 8))]
    close(multiply("plain", tile_expert)(x, w), np.stack(want))


def test_the_tpu_kernels_add_up_over_several_blocks(rows_of, normal, close):
    """Widths of 1,280 and 768 are several blocks each in float32, forward and for the weight
    gradient, so the sums in the scratch memory have to start and end where they should."""
    D, F = 2 * 640, 768
    (x, tile_expert), w = rows_of([0, 0, 1, 2, 3, 4], 8, D), normal(4, D, F) * D**-0.5
    close(both(multiply("pallas_tpu", tile_expert), x, w),
          both(multiply("plain", tile_expert), x, w))


def test_the_tpu_kernels_write_every_element(rows_of, normal, close):
    """Memory that nobody wrote is NaN here, as it is garbage on a device: no expert and no row may
    be left out."""
    from jax.experimental.pallas import tpu as pltpu
    (x, tile_expert), w = rows_of([0, 1, 2, 2, 2, 3, 4, 4], 8, 16), normal(4, 16, 24)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = both(multiply("pallas_tpu", tile_expert, "tpu"), x, w)
    close(got, both(multiply("plain", tile_expert), x, w))


def test_widths_that_blocks_do_not_divide_are_refused(rows_of, normal):
    (x, tile_expert), w = rows_of([0, 1, 2, 3], 8, 2600), normal(4, 2600, 128)
    with pytest.raises(ValueError, match="expected a multiple of 128, found 2600"):
        multiply("pallas_tpu", tile_expert)(x, w)


@pytest.mark.parametrize("impl", ["loop", pytest.param("tiles", marks=pytest.mark.slow), "pallas_tpu"])
@pytest.mark.parametrize("tiles", TILES)
def test_expert_mlp_equals_three_plain_grouped_matmuls(tiles, impl, rows_of, normal, close):
    x, tile_expert = rows_of(tiles, 8, 12)
    gate, up, down = normal(4, 12, 10), normal(4, 12, 10), normal(4, 10, 12)

    def run(impl):
        return both(lambda *a: kernels.expert_mlp(*a, tile_expert, impl), x, gate, up, down)
    close(run(impl), run("plain"), 1e-4)


@pytest.mark.parametrize("impl, rows, tile", [
    ("loop", 64, 64), ("loop", 4096, 128), ("loop", 2**20, 256), ("pallas_tpu", 64, 256),
    ("pallas_tpu", 2**20, 256), ("tiles", 64, 128), ("tiles", 2**20, 512)])
def test_a_tile_is_a_quarter_of_the_mean_load_within_the_kernel_s_limits(impl, rows, tile):
    assert kernels.row_tile(impl, rows, 8) == tile


# ----------------------------------------------------------------------------------- bad arguments

@pytest.mark.parametrize("call", [
    lambda impl: kernels.attention(*[jnp.ones((1, 4, 2, 8))] * 3, jnp.ones((1, 4), int), 4, impl),
    lambda impl: kernels.cross_entropy(jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.zeros(4, int), impl),
    lambda impl: kernels.grouped_matmul(jnp.ones((4, 2)), jnp.ones((1, 2, 3)), jnp.zeros(1, int),
                                        impl),
    lambda impl: kernels.expert_mlp(jnp.ones((4, 2)), *[jnp.ones((1, 2, 2))] * 3,
                                    jnp.zeros(1, int), impl)],
    ids=["attention", "cross_entropy", "grouped_matmul", "expert_mlp"])
def test_an_unknown_implementation_is_an_error(call):
    with pytest.raises(ValueError, match="impl='fast'"):
        call("fast")


def test_an_unknown_platform_is_an_error():
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="platform='vax': expected one of"):
        kernels.attention(x, x, x, jnp.ones((1, 4), int), 4, platform="vax")

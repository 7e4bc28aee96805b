"""DistanceMaskedAttention against Eq. 5-6 written out, against its packed call, and in place of nn.MultiheadAttention."""

import copy
import itertools

import pytest
import torch
from torch import nn

from cafe_kernels import DistanceMaskedAttention, distance_attention

D, HEADS, N = 8, 2, 6
LENGTHS = [4, 0, 6, 1]  # of the rows of a padded batch; one has nothing but padding
CAUSAL = nn.Transformer.generate_square_subsequent_mask(N)
# torch.testing's fp32 tolerance is 1e-5 absolute; float32 sums of 8 terms of size 1 in another order differ by about 1e-7.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def learned(dtype=torch.float32, **options):
    """A module whose mask is not at its start, and whose biases are not zero."""
    torch.manual_seed(0)
    module = DistanceMaskedAttention(D, HEADS, **{"max_distance": N, "batch_first": True} | options).to(dtype)
    for parameter in module.parameters():
        if not parameter[0].any() or parameter.dim() == 1:
            nn.init.normal_(parameter)
    return module


def padded(side="right", dtype=torch.float32):
    """(B, N, d) with random numbers at padding too, and the mask."""
    torch.manual_seed(1)
    x = torch.randn(len(LENGTHS), N, D, dtype=dtype)
    position = torch.arange(N)
    length = torch.tensor(LENGTHS)[:, None]
    return x, position >= length if side == "right" else position < N - length


def cu_seqlens(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def equations(module, query, key, value, padding=None):
    """Eq. 2-6 of padded rows, causal or not, with every term of Eq. 6, the cancelling ones included: output and weights per head."""
    n, head_dim = query.shape[1], module.head_dim
    biases = [0, 0, 0] if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ weight.T + bias).unflatten(-1, (module.num_heads, head_dim)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), module.in_proj_weight.chunk(3), biases, strict=True)
    )
    distance = torch.arange(n)[:, None] - torch.arange(n)
    logits = q @ k.transpose(2, 3) * module.scale
    if module.distance is not None:
        torch.manual_seed(2)
        never_read = torch.randn_like(module.distance)[:, : module.max_distance if module.causal else 1]
        table = torch.cat([never_read, module.distance], 1)  # D, 2n rows
        assert table.shape[1] == 2 * module.max_distance
        read = k if module.mask_reads == "keys" else v
        summed = q[:, :, :, None] + read[:, :, None] + table[:, module.max_distance + distance]
        logits = logits + (summed * module.distance_weight[:, None, None]).sum(-1) + 0.7  # b_L
    hidden = ((distance < 0) & module.causal)[None, None]
    if padding is not None:
        hidden = hidden | padding[:, None, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    out = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    if padding is not None:
        out = out.masked_fill(padding[..., None], 0)
        weights = weights.masked_fill(padding[:, None, :, None], 0)
    return out, weights


@pytest.mark.parametrize("mask_reads", ["keys", "values"])
@pytest.mark.parametrize("score_scale", ["sqrt_d", "sqrt_head_dim"])
@pytest.mark.parametrize("max_distance", [N, N + 3, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_equations(mask_reads, score_scale, max_distance, bias, causal):
    options = {"max_distance": max_distance, "mask_reads": mask_reads, "score_scale": score_scale, "bias": bias}
    module = learned(torch.float64, causal=causal, **options)
    x, _ = padded(dtype=torch.float64)
    expected, expected_weights = equations(module, x, x, x)
    out, weights = module(x, x, x, is_causal=causal, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    flat = module.packed(x.flatten(0, 1), cu_seqlens([N] * len(x)))
    torch.testing.assert_close(flat, expected.flatten(0, 1))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_those_of_the_equations(causal, side, dtype):
    """Of the inputs and all parameters; in float32 by the C++ backend, in float64 by the reference."""
    module, (x, padding) = learned(dtype, causal=causal), padded(side, dtype)
    results = []
    for call in (
        lambda q, k, v: module(q, k, v, key_padding_mask=padding, is_causal=causal, need_weights=False)[0],
        lambda q, k, v: equations(module, q, k, v, padding)[0],
    ):
        leaves = [(x * factor).requires_grad_() for factor in (1, 0.5, 2)]
        module.zero_grad()
        out = call(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out))
        gradients = {name: p.grad for name, p in module.named_parameters()}
        results.append({"out": out} | dict(zip("qkv", (leaf.grad for leaf in leaves), strict=True)) | gradients)
    torch.testing.assert_close(*results)
    assert all(value.any() for value in results[0].values())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", ["one", "key is value", "three"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("causal", [True, False])
def test_padded_call_equals_packed(causal, side, batch_first, inputs, dropout):
    """Also under dropout: both calls draw the same seed from torch's generator."""
    module, (x, padding) = learned(batch_first=batch_first, dropout=dropout, causal=causal), padded(side)
    key = x if inputs == "one" else 0.5 * x
    value = key if inputs != "three" else key.clone()
    call = [t if batch_first else t.transpose(0, 1) for t in (x, key, value)]
    if inputs == "one":
        call = call[:1] * 3
    torch.manual_seed(3)
    out, _ = module(*call, key_padding_mask=padding, attn_mask=CAUSAL if causal else None)
    out = out if batch_first else out.transpose(0, 1)
    torch.manual_seed(3)
    expected = module.packed(x[~padding], cu_seqlens(LENGTHS), key_value=key[~padding])
    torch.testing.assert_close(out[~padding], expected, rtol=0, atol=0)
    assert not out[padding].any()
    if dropout:
        again = module.packed(x[~padding], cu_seqlens(LENGTHS), key_value=key[~padding])
        assert not torch.equal(again, expected)
        torch.manual_seed(3)
        plain = module.eval().packed(x[~padding], cu_seqlens(LENGTHS), key_value=key[~padding])
        assert not torch.equal(plain, expected)


def test_packed_dropout_follows_seed_and_offset():
    module, (x, padding) = learned(dropout=0.4), padded()
    x, cu = x[~padding], cu_seqlens(LENGTHS)
    out = {(seed, offset): module.packed(x, cu, seed=seed, offset=offset) for seed in (3, 4) for offset in (0, 1)}
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(out.values(), 2))
    for (seed, offset), value in out.items():
        assert torch.equal(value, module.packed(x, cu, seed=seed, offset=offset))
        q, k, v = module._op_inputs(x, x, x)
        attended = distance_attention(
            q, k, v, module.log_theta(), cu, scale=module.scale, dropout_p=0.4, seed=seed, offset=offset
        )
        assert torch.equal(value, module.out_proj(attended.flatten(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_without_values(dtype):
    """On device "meta", as those do who count operations or memory of a model too large to build."""
    module = DistanceMaskedAttention(D, HEADS, N, dropout=0.4, batch_first=True, device="meta", dtype=dtype)
    x = torch.empty(2, N, D, device="meta", dtype=dtype)
    out, weights = module(x, x, x, is_causal=True)
    assert (out.shape, weights.shape, out.dtype) == (x.shape, (2, N, N), dtype)
    out.sum().backward()
    assert all(p.grad.shape == p.shape for p in module.parameters())
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    assert module.packed(x.flatten(0, 1), cu).shape == (2 * N, D)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_neither_read_nor_given_a_gradient(side):
    module, (x, padding) = learned(), padded(side)
    x[padding] = torch.nan
    x.requires_grad_()
    out, weights = module(x, x, x, key_padding_mask=padding, is_causal=True)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert weights.isfinite().all()
    assert not x.grad[padding].any()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_those_that_made_the_output(causal, side, dropout):
    module, (x, padding) = learned(torch.float64, dropout=dropout, causal=causal), padded(side, torch.float64)
    call = {"key_padding_mask": None if side == "none" else padding, "is_causal": causal}
    padding = call["key_padding_mask"]
    out, weights = module(x, x, x, **call, average_attn_weights=False)
    value = (x @ module.in_proj_weight[2 * D :].T + module.in_proj_bias[2 * D :]).unflatten(-1, (HEADS, -1))
    expected = module.out_proj((weights @ value.transpose(1, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected if padding is None else expected.masked_fill(padding[..., None], 0))
    if not dropout:
        torch.testing.assert_close(weights, equations(module, x, x, x, padding)[1])
        torch.testing.assert_close(module(x, x, x, **call)[1], weights.mean(1))
        assert not module(x, x, x, **call, need_weights=False)[1]


def multihead(batch_first=True, **options):
    torch.manual_seed(4)
    attention = nn.MultiheadAttention(D, HEADS, batch_first=batch_first, **options)
    for parameter in attention.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return attention.eval()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("max_distance", [N, None])
@pytest.mark.parametrize("padded_at", ["none", "right", "left", "right, as floats"])
@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL < 0, CAUSAL.expand(len(LENGTHS) * HEADS, N, N)])
def test_from_multihead_attention_leaves_the_outputs(batch_first, bias, average, max_distance, padded_at, mask):
    attention = multihead(batch_first, bias=bias, dropout=0.3)
    module = DistanceMaskedAttention.from_multihead_attention(attention, max_distance)
    assert not module.training
    x, padding = padded("left" if padded_at == "left" else "right")
    options = {"attn_mask": mask, "average_attn_weights": average}
    if padded_at == "none":
        padding = torch.zeros_like(padding)
    else:
        options["key_padding_mask"] = padding
    if padded_at == "right, as floats":
        options["key_padding_mask"] = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    x = x if batch_first else x.transpose(0, 1)
    out, weights = module(x, x, x, **options)
    expected, expected_weights = attention(x, x, x, **options)
    keep = ~padding if batch_first else ~padding.T  # at padding PyTorch has NaN, or numbers for nobody
    torch.testing.assert_close(out[keep], expected[keep], **CLOSE)
    if not average:
        weights, expected_weights = weights.transpose(1, 2), expected_weights.transpose(1, 2)
    torch.testing.assert_close(weights[~padding], expected_weights[~padding], **CLOSE)


@pytest.mark.parametrize("padded_at", ["none", "right", "left"])
def test_from_multihead_attention_without_causal_leaves_the_outputs(padded_at):
    attention = multihead()
    module = DistanceMaskedAttention.from_multihead_attention(attention, N, causal=False)
    x, padding = padded("left" if padded_at == "left" else "right")
    padding = torch.zeros_like(padding) if padded_at == "none" else padding
    expected, expected_weights = attention(x, x, x, key_padding_mask=padding)
    out, weights = module(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding], **CLOSE)
    torch.testing.assert_close(weights[~padding], expected_weights[~padding], **CLOSE)


@pytest.mark.parametrize("average", [True, False])
def test_from_multihead_attention_takes_one_sequence(average):
    attention = multihead()
    module = DistanceMaskedAttention.from_multihead_attention(attention, N)
    x = padded()[0][0]
    padding = torch.arange(N) >= 4
    options = {"attn_mask": CAUSAL < 0, "average_attn_weights": average}
    expected = attention(x, x, x, **options)
    torch.testing.assert_close(module(x, x, x, **options), expected, **CLOSE)
    out, weights = module(x, x, x, key_padding_mask=padding, **options)
    torch.testing.assert_close(out[:4], expected[0][:4], **CLOSE)
    torch.testing.assert_close(weights[..., :4, :4], expected[1][..., :4, :4], **CLOSE)
    assert not out[4:].any()
    assert not weights[..., 4:, :].any()


def test_from_multihead_attention_takes_over_its_options():
    attention = nn.MultiheadAttention(D, HEADS, dropout=0.3, dtype=torch.float64)
    attention.out_proj.weight.requires_grad_(False)
    module = DistanceMaskedAttention.from_multihead_attention(attention, N)
    assert module.training
    assert module.dropout == 0.3
    assert not module.batch_first
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["out_proj.weight"]
    assert module.load_state_dict(attention.state_dict(), strict=False).unexpected_keys == []
    assert not module.theta_curves().any()
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 4}, {"vdim": 4}):
        with pytest.raises(ValueError, match="no counterpart"):
            DistanceMaskedAttention.from_multihead_attention(nn.MultiheadAttention(D, HEADS, **options), N)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_in_a_transformer_encoder_layer(causal, train):
    """Whose fused inference would read in_proj_weight and leave out the mask."""
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(D, HEADS, 16, dropout=0.0, batch_first=True).train(train)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=causal).train(train)
    x, padding = padded()
    padding[1, 0] = False  # a row without tokens is NaN in PyTorch
    call = {"src_key_padding_mask": padding} | ({"mask": CAUSAL < 0, "is_causal": True} if causal else {})
    with torch.no_grad():
        expected = encoder(x, **call)
        for layer in encoder.layers:
            layer.self_attn = DistanceMaskedAttention.from_multihead_attention(layer.self_attn, N, causal)
        out = encoder(x, **call)
        torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
        nn.init.normal_(encoder.layers[0].self_attn.distance_weight)
        assert not torch.allclose(encoder(x, **call)[~padding], expected[~padding], atol=1e-2)


def test_starts_at_theta_one_and_learns_it():
    torch.manual_seed(0)
    module = DistanceMaskedAttention(D, HEADS, 10)
    x, cu = torch.randn(7, D), torch.tensor([0, 3, 7], dtype=torch.int32)
    plain = DistanceMaskedAttention(D, HEADS, None)
    plain.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(module.packed(x, cu), plain.packed(x, cu))
    module.packed(x, cu).square().sum().backward()
    assert (module.distance_weight.grad != 0).any()


def test_theta_curves_are_the_odds_of_a_distance():
    """With keys that are all zero only the distance is left: weight t steps back / weight of the token itself = exp(curve)."""
    module = learned(torch.float64)
    nn.init.zeros_(module.in_proj_weight[D : 2 * D].detach())
    nn.init.zeros_(module.in_proj_bias[D : 2 * D].detach())
    curves = module.theta_curves()
    assert curves.shape == (HEADS, N)
    assert not curves.requires_grad
    x = torch.randn(1, N, D, dtype=torch.float64)
    newest = module(x, x, x, is_causal=True, average_attn_weights=False)[1][0, :, -1].flip(-1)
    torch.testing.assert_close((newest / newest[:, :1]).float(), curves.exp())
    both = learned(torch.float64, causal=False)
    both.load_state_dict(module.state_dict() | {"distance": torch.randn(HEADS, 2 * N - 1, D // HEADS)})
    curves = both.theta_curves()
    weights = both(x, x, x, average_attn_weights=False)[1][0]
    for i in range(N):  # newest first: i - j from i - N + 1, the future, to i
        ratios = (weights[:, i] / weights[:, i, i, None]).flip(-1)
        torch.testing.assert_close(ratios.float(), curves[:, i : i + N].exp())
    with pytest.raises(ValueError, match="no distance mask"):
        DistanceMaskedAttention(D, HEADS, None).theta_curves()


def test_repr_names_the_options():
    found = repr(learned(dropout=0.25, mask_reads="values"))
    options = "8, num_heads=2, max_distance=6, dropout=0.25, bias=True, batch_first=True, scale=0.3536, "
    assert options + "mask_reads='values', causal=True" in found


def test_state_dict_deepcopy_and_moves():
    module, (x, padding) = learned(), padded()
    call = {"key_padding_mask": padding, "is_causal": True, "need_weights": False}
    expected = module(x, x, x, **call)[0]
    fresh = DistanceMaskedAttention(D, HEADS, N, batch_first=True)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), fresh):
        torch.testing.assert_close(other(x, x, x, **call)[0], expected, rtol=0, atol=0)
    double = copy.deepcopy(module).double()
    torch.testing.assert_close(double(*[x.double()] * 3, **call)[0].float(), expected, **CLOSE)
    half = copy.deepcopy(module).bfloat16()
    out, weights = half(*[x.bfloat16()] * 3, key_padding_mask=padding, is_causal=True)
    assert out.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits
    meta = DistanceMaskedAttention(D, HEADS, N, device="meta", batch_first=True)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    torch.testing.assert_close(meta(x, x, x, **call)[0], expected, rtol=0, atol=0)


def test_autocast():
    module, (x, padding) = learned(), padded()
    call = {"key_padding_mask": padding, "is_causal": True}
    expected = module(x, x, x, **call)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(x, x, x, **call)
        assert module.log_theta().dtype == torch.float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close((out.float(), weights.float()), expected, rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


def test_compile():
    """Whole-graph without padding and dropout; both look at values, so there the graph breaks, and nothing else changes."""
    torch._dynamo.reset()
    whole, (x, padding) = learned(), padded()
    compiled = torch.compile(lambda x: whole(x, x, x, is_causal=True)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), whole(x, x, x, is_causal=True)[0], **CLOSE)

    module = learned(dropout=0.4)

    def step(x):
        return module(x, x, x, key_padding_mask=padding, attn_mask=CAUSAL)[0].square().sum()

    compiled = torch.compile(step, backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(12):  # more than dynamo compiles anew: the seed must not be a constant of the graph
            results = []
            for function in (compiled, step):
                torch.manual_seed(seed)
                module.zero_grad()
                function(x).backward()
                results.append({name: p.grad.clone() for name, p in module.named_parameters()})
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_empty_batches(shape):
    module = learned()
    x = torch.zeros(*shape, D)
    out, weights = module(x, x, x, key_padding_mask=torch.zeros(shape, dtype=torch.bool), is_causal=True)
    assert out.shape == x.shape
    assert weights.shape == (*shape, shape[1])


X = torch.zeros(2, N, D)
HOLE = torch.tensor([[False] * N, [False, True, False, True, True, True]])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, X[:, :3], X[:, :3]), {"is_causal": True}, "cross-attention"),
        ((X[..., :4],) * 3, {"is_causal": True}, "must have one shape"),
        ((X[None],) * 3, {"is_causal": True}, "must have one shape"),
        ((X, X, X), {}, "pass is_causal=True or the causal attn_mask"),
        ((X, X, X), {"attn_mask": torch.zeros(N, N)}, "must be the causal one of 6 tokens"),
        ((X, X, X), {"attn_mask": CAUSAL.T}, "must be the causal one"),
        ((X, X, X), {"attn_mask": CAUSAL.clamp(min=-1e4)}, "-inf"),
        ((X, X, X), {"attn_mask": CAUSAL[:3, :3]}, "must be the causal one"),
        ((X, X, X), {"attn_mask": CAUSAL.expand(3, N, N)}, r"\(6, 6\) or \(4, 6, 6\)"),
        ((X, X, X), {"attn_mask": CAUSAL.expand(2, 2, N, N)}, "must be the causal one"),
        ((X, X, X), {"attn_mask": (CAUSAL < 0).to(torch.uint8)}, "must be the causal one"),
        ((X, X, X), {"is_causal": True, "key_padding_mask": HOLE}, "between the tokens of row 1"),
        ((X, X, X), {"is_causal": True, "key_padding_mask": HOLE[:1]}, r"must be \(2, 6\), got \(1, 6\)"),
        ((X, X, X), {"is_causal": True, "key_padding_mask": HOLE.float()}, "float with -inf"),
        ((torch.zeros(2, N + 1, D),) * 3, {"is_causal": True}, "max_distance=6"),
    ],
)
def test_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        learned()(*arguments, **options)


def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([torch.zeros(2, D), torch.zeros(3, D)])
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        learned(causal=False)(x, x, x)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": CAUSAL}, {"attn_mask": torch.zeros(N, N)}])
def test_without_causal_refuses_masks(options):
    with pytest.raises(ValueError, match="this attention is not causal: pass neither attn_mask nor is_causal"):
        learned(causal=False)(X, X, X, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_a_table_of_the_other_kind_is_refused(causal):
    other = learned(causal=not causal).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for distance"):
        learned(causal=causal).load_state_dict(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "multiple"),
        ({"max_distance": 0}, "max_distance"),
        ({"dropout": 1.0}, "dropout"),
        ({"score_scale": "none"}, "score_scale"),
        ({"mask_reads": "queries"}, "mask_reads"),
    ],
)
def test_refuses_options(change, message):
    with pytest.raises(ValueError, match=message):
        DistanceMaskedAttention(**{"embed_dim": D, "num_heads": HEADS, "max_distance": N} | change)


def test_more_padding_than_max_distance_is_no_matter():
    module, (x, padding) = learned(max_distance=4), padded()
    padding[2, 4:] = True
    out, _ = module(x, x, x, key_padding_mask=padding, is_causal=True)
    torch.testing.assert_close(out[2, :4], module.packed(x[2, :4], cu_seqlens([4])))


@pytest.mark.parametrize("mask_reads", ["keys", "values"])
@pytest.mark.parametrize("causal", [True, False])
def test_only_local_heads_have_a_mask(mask_reads, causal):
    """Of two heads the first is as in a module where both have the mask, the second as in one without."""
    torch.manual_seed(0)
    options = {"causal": causal, "mask_reads": mask_reads, "bias": False}
    some = DistanceMaskedAttention(8, 2, 6, local_heads=1, **options)
    both, none = DistanceMaskedAttention(8, 2, 6, **options), DistanceMaskedAttention(8, 2, None, **options)
    nn.init.normal_(some.distance_weight)
    for other in (both, none):
        other.in_proj_weight, other.out_proj = some.in_proj_weight, nn.Identity()
    some.out_proj = nn.Identity()
    both.distance.data[:1], both.distance_weight.data[:1] = some.distance.data, some.distance_weight.data
    nn.init.normal_(both.distance_weight.data[1:])
    x, cu_seqlens = torch.randn(9, 8), torch.tensor([0, 6, 9], dtype=torch.int32)
    out, masked, plain = (module.packed(x, cu_seqlens) for module in (some, both, none))
    torch.testing.assert_close(out[:, :4], masked[:, :4])
    torch.testing.assert_close(out[:, 4:], plain[:, 4:])
    assert not torch.allclose(masked, plain)
    with pytest.raises(ValueError, match="local_heads must be from 1 to num_heads=2, got 3"):
        DistanceMaskedAttention(8, 2, 6, local_heads=3)


def test_values_may_read_something_else():
    torch.manual_seed(0)
    module = DistanceMaskedAttention(8, 2, 6, bias=False)
    x, value, cu_seqlens = torch.randn(5, 8), torch.randn(5, 8), torch.tensor([0, 5], dtype=torch.int32)
    out = module.packed(x, cu_seqlens, value=value)
    expected = module(x, x, value, is_causal=True)[0]
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, module.packed(x, cu_seqlens))


@pytest.mark.parametrize("mask_reads", ["keys", "values"])
@pytest.mark.parametrize(
    "options", [{}, {"max_distance": None}, {"causal": False}, {"causal": False, "local_heads": 1}, {"max_distance": 9}]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_dense_is_packed_without_packing(options, mask_reads, side):
    module = learned(dtype=torch.float64, mask_reads=mask_reads, **options).eval()
    x, padding = padded(side, torch.float64)
    real = ~padding
    other, value, positions = (torch.randn_like(x) for _ in range(3))
    rows, tokens = {}, {}
    for name, part in (("key_value", other), ("value", value), ("positions", positions)):
        rows[name], tokens[name] = part.flatten(0, 1), part[real]
    want = module.packed(x[real], cu_seqlens(LENGTHS), **tokens)
    got = module.dense(x.flatten(0, 1), real, **rows).view_as(x)
    assert got.isfinite().all()
    torch.testing.assert_close(got[real], want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        module.dense(x.flatten(0, 1), real).view_as(x)[real], module.packed(x[real], cu_seqlens(LENGTHS))
    )

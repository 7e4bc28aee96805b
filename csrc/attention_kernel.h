// One sequence and head of distance attention, forward and backward, for one instruction set: see simd.h. The equations are in
// attention.cpp.
//
// All work is matrix products of a strip of kRows rows, whose sums stay in registers, with the rows' softmax in between
// while the strip is in the first-level cache. A product takes its right factor in panels, two vectors of columns. Short
// sequences of float32 whose rows are whole vectors are read, and results written, where they lie; others, and all that
// is transposed, are first packed: the rows of a panel one after another, zeros where a vector is not full. The logits of
// a sequence of at most one vector are dot products instead: to transpose its keys would take longer than they do.

constexpr int64_t kStride = kKeys + W;  // of a tile of weights: W zeros between rows, for add_diagonals
static_assert(kQueries % kRows == 0 && kKeys % kQueries == 0 && kKeys % kPanel == 0, "blocks must fit each other");

typedef uint64_t Pairs __attribute__((vector_size(4 * W)));  // the W / 2 counters of Philox, or pairs of its words

// What -inf hides stays hidden, even a NaN.
INLINE Vector add_bias(Vector x, const float* at) {
    Vector bias = load(at);
    return bias > -std::numeric_limits<float>::infinity() ? x + bias : bias;
}

// x (n, dim), rows `stride` apart, as a right factor: where it lies, or packed.
template <class T>
TARGET Right right_factor(const T* x, int64_t stride, int64_t n, int64_t dim, float* panels) {
    if constexpr (std::is_same_v<T, float>)
        if (dim % W == 0 && n * stride <= kInPlace) return {x, stride, kPanel};
    return pack(x, stride, n, dim, panels);
}

// The left factor of a product is read one number at a time, so float32 is read where it lies.
INLINE Rows<const float> unpacked(const float* x, int64_t stride, int64_t, int64_t, float*) { return {x, stride}; }
TARGET inline Rows<const float> unpacked(const Bf16* x, int64_t stride, int64_t n, int64_t dim, float* room) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < dim; d += W) store(room + i * dim + d, load(x + i * stride + d, dim - d), dim - d);
    return {room, dim};
}

// Where products write what becomes rows of x: there, or to `room`, for `finish` to convert.
template <class T>
INLINE Rows<float> results(T* x, int64_t stride, int64_t dim, float* room) {
    if constexpr (std::is_same_v<T, float>)
        if (dim % W == 0) return {x, stride};
    return {room, (dim + W - 1) / W * W};
}

template <class T>
TARGET void finish(Rows<float> from, T* x, int64_t stride, int64_t n, int64_t dim) {
    if ((void*)from.x == (void*)x) return;
    for (int64_t row = 0; row < n; ++row)
        for (int64_t d = 0; d < dim; d += W) store(x + row * stride + d, load(from.x + row * from.stride + d), dim - d);
}

// mask[r][j] = 1 / (1 - p) where dropout keeps the weight of query token + r and key + j, else 0. The lanes of Philox are
// query tokens; a transposition of pairs of words turns them into rows.
TARGET inline void draw_mask(const Problem& p, int64_t head, int64_t token, int64_t key, int64_t rows, int64_t vectors,
                             float* mask) {
    constexpr uint64_t low = 0xFFFFFFFF;
    Pairs lane;
    for (int l = 0; l < W / 2; ++l) lane[l] = l;
    const Pairs zero = {}, m0 = zero + kPhiloxM0, m1 = zero + kPhiloxM1;
    for (int64_t r = 0; r < rows; r += W / 2)
        for (int64_t x = 0; x < vectors; ++x) {
            Pairs words[W / 2];
            for (int c = 0; c < W / 4; ++c) {
                Pairs c0 = zero + uint32_t(head * 65536 + (key + x * W) / 4 + c), c1 = uint64_t(token + r) + lane;
                Pairs c2 = zero + (p.offset & low), c3 = zero + (p.offset >> 32);
                uint32_t k0 = uint32_t(p.seed), k1 = uint32_t(p.seed >> 32);
#pragma GCC unroll 10
                for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
                    Pairs a = CAFE_MULTIPLY(m0, c0), b = CAFE_MULTIPLY(m1, c2);
                    c0 = (b >> 32) ^ c1 ^ uint64_t(k0);
                    c2 = (a >> 32) ^ c3 ^ uint64_t(k1);
                    c1 = b;
                    c3 = a;
                }
                words[2 * c] = (c0 & low) | c1 << 32;
                words[2 * c + 1] = (c2 & low) | c3 << 32;
            }
            transpose(words);
            for (int l = 0; l < W / 2; ++l)
                store(mask + (r + l) * kKeys + x * W, (Words)words[l] >= p.threshold ? p.keep_scale + Vector{} : Vector{});
        }
}

// to[r][j] = x[i + r] . y[j] for r < m and all j < n <= W that row i + r sees; what follows in the row is hidden later.
template <bool kCausal, class T>
TARGET void dots_of_strip(int64_t i, int64_t m, int64_t n, const T* x, const T* y, int64_t stride, int64_t dim, float* to,
                          int64_t to_stride) {
    for (int64_t r = 0; r < m; ++r)
        store(to + r * to_stride, dots(x + (i + r) * stride, y, stride, kCausal ? i + r + 1 : n, dim));
}

struct Block {  // queries first ... first + rows - 1 against keys key ... key + keys - 1 of n
    int64_t first, rows, key, n, ahead;
    int64_t keys(int64_t strip, int64_t strip_rows) const {  // that some query of a strip of it sees
        return std::min(kKeys, std::min(n, first + strip + strip_rows + ahead) - key);
    }
};

// Logits of the keys from `key` on, with their biases, which hide what is after a causal query; else what is after the n
// keys of the sequence has to be hidden too.
template <bool kCausal>
INLINE Vector logits_of(float scale, const float* products, const float* bias, int64_t key, int64_t n) {
    Vector logits = add_bias(scale * load(products), bias + key);
    if constexpr (!kCausal) {
        Ints lane;
        for (int l = 0; l < W; ++l) lane[l] = l;
        logits = lane < int32_t(n - key) ? logits : -std::numeric_limits<float>::infinity() + Vector{};
    }
    return logits;
}

template <bool kCausal, class T>
TARGET void forward(const Problem& p, const Tensors<T>& t, int64_t sequence, int64_t head, Room& room) {
    const int64_t begin = p.cu_seqlens[sequence], n = p.cu_seqlens[sequence + 1] - begin, dim = p.dim;
    const int64_t stride = p.heads * dim, start = begin * stride + head * dim, vectors = (dim + W - 1) / W;
    const int64_t columns = vectors * W, padded = (dim + kPanel - 1) / kPanel * kPanel;
    const int64_t ahead = kCausal ? 0 : p.ahead;
    const bool brief = n <= W;
    if (n == 0) return;
    room.reset(padded * (2 * n + kPanel) + n * (dim + columns) + 2 * (kRows + W) * kKeys + 2 * kQueries + 1024);
    float* keys = room.take((n + kPanel) * dim);
    float* weights = room.take(kRows * kKeys);
    float* mask = room.take((kRows + W) * kKeys);
    float* top = room.take(kQueries);  // the running maximum and sum of each row
    float* sum = room.take(kQueries);
    if (!brief) pack_transposed(t.k + start, stride, n, dim, keys);
    const Right values = right_factor(t.v + start, stride, n, dim, room.take(n * padded));
    const Rows<const float> q = unpacked(t.q + start, stride, n, dim, room.take(n * dim));
    const Rows<float> out = results(t.out + start, stride, dim, room.take(n * columns));
    const float* bias = p.bias + head * p.bias_stride + p.longest - 1;

    for (int64_t first = 0; first < n; first += kQueries) {
        const int64_t rows = std::min(kQueries, n - first), seen = std::max(int64_t(0), first - p.reach) / kKeys * kKeys;
        const int64_t end = std::min(n, first + kQueries + ahead);
        std::fill_n(top, rows, std::numeric_limits<float>::lowest());
        std::fill_n(sum, rows, 0.0f);
        for (int64_t key = seen; key < end; key += kKeys) {
            const bool last = key + kKeys >= end;
            for (int64_t strip = 0; strip < rows; strip += kRows) {
                const int64_t m = std::min<int64_t>(kRows, rows - strip), i = first + strip;
                const int64_t depth = Block{first, rows, key, n, ahead}.keys(strip, m), across = (depth + W - 1) / W;
                if (brief) dots_of_strip<kCausal>(i, m, n, t.q + start, t.k + start, stride, dim, weights, kKeys);
                else
                    multiply<false>(m, across, dim, q.x + i * q.stride, q.stride, {keys + key * dim, kPanel, dim * kPanel},
                                    kOnes, false, weights, kKeys);
                if (p.threshold) draw_mask(p, head, begin + i, key, m, across, mask);
                float alpha[kRows];
                for (int64_t r = 0; r < m; ++r) {
                    const int64_t row = strip + r;
                    float* w = weights + r * kKeys;
                    Vector highest = top[row] + Vector{}, total = {};
                    for (int64_t x = 0; x < across * W; x += W) {
                        Vector logit = logits_of<kCausal>(p.scale, w + x, bias - (i + r), key + x, n);
                        store(w + x, logit);
                        highest = larger(logit, highest);
                    }
                    const float now = max_of(highest);
                    for (int64_t x = 0; x < across * W; x += W) {
                        Vector weight = exponential(load(w + x) - now);
                        total += weight;
                        store(w + x, p.threshold ? weight * load(mask + r * kKeys + x) : weight);
                    }
                    const float shrink = key == seen ? 0 : exponential(top[row] - now + Vector{})[0];
                    sum[row] = sum[row] * shrink + sum_of(total);
                    top[row] = now;
                    alpha[r] = last ? 1 / sum[row] : 1;
                    if (key > seen)
                        for (int64_t x = 0; x < columns; x += W) {
                            float* at = out.x + (i + r) * out.stride + x;
                            store(at, shrink * alpha[r] * load(at));
                        }
                }
                multiply<false>(m, vectors, depth, weights, kKeys, values.from(key), alpha, key > seen,
                                out.x + i * out.stride, out.stride);
            }
        }
        for (int64_t row = 0; row < rows; ++row) t.lse[head * p.total + begin + first + row] = top[row] + std::log(sum[row]);
    }
    finish(out, t.out + start, stride, n, dim);
}

// dbias[t] += the sum of dS over its diagonal t = i - j >= -ahead. dbias is reversed, as bias is, so that a vector of diagonals is a
// vector of one row of dS, and moves by one from row to row.
TARGET inline void add_diagonals(const Block& b, const float* ds, float* dbias) {
    const int64_t apart = b.first - b.key, width = b.keys(0, b.rows);
    for (int64_t t = std::max(-b.ahead, apart - width + 1); t < apart + b.rows; t += W) {
        const int64_t left = apart - t - W + 1;  // the column of the vector in row 0
        const int64_t from = std::max<int64_t>(0, t - apart), to = std::min(b.rows, width - left);
        Vector sum = {};
        for (int64_t r = from; r < to; ++r) sum += load(ds + r * kStride + left + r);
        store(dbias - t - W + 1, sum + load(dbias - t - W + 1));
    }
}

template <bool kCausal, class T>
TARGET void backward(const Problem& p, const Gradients<T>& t, int64_t sequence, int64_t head, float* dbias, Room& room) {
    const int64_t begin = p.cu_seqlens[sequence], n = p.cu_seqlens[sequence + 1] - begin, dim = p.dim;
    const int64_t stride = p.heads * dim, start = begin * stride + head * dim, vectors = (dim + W - 1) / W;
    const int64_t columns = vectors * W, padded = (dim + kPanel - 1) / kPanel * kPanel;
    const int64_t ahead = kCausal ? 0 : p.ahead;
    const bool brief = n <= W;
    if (n == 0) return;
    const int64_t tile = kQueries * kStride + W;
    room.reset(padded * (5 * n + 2 * kPanel) + n * (2 * dim + 3 * columns) + 2 * tile + (kRows + W) * kKeys + 1024);
    float* keys_transposed = room.take((n + kPanel) * dim);
    float* values_transposed = room.take((n + kPanel) * dim);
    float* weights = room.take(tile) + W;
    float* ds = room.take(tile) + W;
    float* mask = room.take((kRows + W) * kKeys);
    if (!brief) {
        pack_transposed(t.k + start, stride, n, dim, keys_transposed);
        pack_transposed(t.v + start, stride, n, dim, values_transposed);
    }
    const Right keys = right_factor(t.k + start, stride, n, dim, room.take(n * padded));
    const Right queries = right_factor(t.q + start, stride, n, dim, room.take(n * padded));
    const Right gradients = right_factor(t.grad_out + start, stride, n, dim, room.take(n * padded));
    const Rows<const float> q = unpacked(t.q + start, stride, n, dim, room.take(n * dim));
    const Rows<const float> grad_out = unpacked(t.grad_out + start, stride, n, dim, room.take(n * dim));
    const Rows<float> dq = results(t.dq + start, stride, dim, room.take(n * columns));
    const Rows<float> dk = results(t.dk + start, stride, dim, room.take(n * columns));
    const Rows<float> dv = results(t.dv + start, stride, dim, room.take(n * columns));
    float scales[kRows];
    std::fill_n(scales, kRows, p.scale);
    for (int64_t r = -1; r < std::min(n, kQueries); ++r) store(ds + r * kStride + kKeys, Vector{});
    const float* bias = p.bias + head * p.bias_stride + p.longest - 1;
    dbias += p.longest - 1;

    for (int64_t first = 0; first < n; first += kQueries) {
        const int64_t rows = std::min(kQueries, n - first), seen = std::max(int64_t(0), first - p.reach) / kKeys * kKeys;
        const int64_t end = std::min(n, first + kQueries + ahead);
        for (int64_t key = seen; key < end; key += kKeys) {
            const Block block{first, rows, key, n, ahead};
            for (int64_t strip = 0; strip < rows; strip += kRows) {
                const int64_t m = std::min<int64_t>(kRows, rows - strip), i = first + strip;
                const int64_t depth = block.keys(strip, m), across = (depth + W - 1) / W;
                float *w = weights + strip * kStride, *d = ds + strip * kStride;
                if (brief) {
                    dots_of_strip<kCausal>(i, m, n, t.q + start, t.k + start, stride, dim, w, kStride);
                    dots_of_strip<kCausal>(i, m, n, t.grad_out + start, t.v + start, stride, dim, d, kStride);
                } else {
                    multiply<false>(m, across, dim, q.x + i * q.stride, q.stride,
                                    {keys_transposed + key * dim, kPanel, dim * kPanel}, kOnes, false, w, kStride);
                    multiply<false>(m, across, dim, grad_out.x + i * grad_out.stride, grad_out.stride,
                                    {values_transposed + key * dim, kPanel, dim * kPanel}, kOnes, false, d, kStride);
                }
                if (p.threshold) draw_mask(p, head, begin + i, key, m, across, mask);
                for (int64_t r = 0; r < m; ++r) {
                    const float lse = t.lse[head * p.total + begin + i + r];
                    const int64_t row = start + (i + r) * stride;
                    Vector products = {};
                    for (int64_t c = 0; c < dim; c += W)
                        products += load(t.grad_out + row + c, dim - c) * load(t.out + row + c, dim - c);
                    const float delta = sum_of(products);
                    for (int64_t x = 0; x < across * W; x += W) {
                        float *at = w + r * kStride + x, *dat = d + r * kStride + x;
                        Vector weight = exponential(logits_of<kCausal>(p.scale, at, bias - (i + r), key + x, n) - lse);
                        Vector keep = p.threshold ? load(mask + r * kKeys + x) : 1 + Vector{};
                        store(at, weight * keep);
                        store(dat, weight * (load(dat) * keep - delta));
                    }
                    if constexpr (!kCausal) store(d + r * kStride + across * W, Vector{});  // for add_diagonals
                }
                multiply<false>(m, vectors, depth, d, kStride, keys.from(key), scales, key > seen, dq.x + i * dq.stride,
                                dq.stride);
            }
            const int64_t width = block.keys(0, rows);
            for (int64_t strip = 0; strip < width; strip += kRows) {  // of keys; queries before them do not see them
                const int64_t m = std::min<int64_t>(kRows, width - strip), from = std::max<int64_t>(0, key + strip - ahead - first);
                const int64_t at = key + strip, tile_at = from * kStride + strip;
                const bool add = first > 0 && first + ahead > at;  // the block before saw as far as that
                multiply<true>(m, vectors, rows - from, weights + tile_at, kStride, gradients.from(first + from), kOnes, add,
                               dv.x + at * dv.stride, dv.stride);
                multiply<true>(m, vectors, rows - from, ds + tile_at, kStride, queries.from(first + from), scales, add,
                               dk.x + at * dk.stride, dk.stride);
            }
            if (t.dbias) add_diagonals(block, ds, dbias);
        }
    }
    finish(dq, t.dq + start, stride, n, dim);
    finish(dk, t.dk + start, stride, n, dim);
    finish(dv, t.dv + start, stride, n, dim);
}

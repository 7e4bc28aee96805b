// The kernels of losses.cpp for one instruction set: see simd.h. The equations are in losses.cpp.

template <class T>
struct Row {
    const T *own, *intent;
};

// kComposed: the row is the item's own and its intent's.
template <bool kComposed, class T>
INLINE Vector at(const Row<T>& row, int64_t x) {
    return kComposed ? load(row.own + x) + load(row.intent + x) : load(row.own + x);
}

template <bool kComposed, class T>  // zeros from count on
INLINE Vector at(const Row<T>& row, int64_t x, int64_t count) {
    return kComposed ? load(row.own + x, count) + load(row.intent + x, count) : load(row.own + x, count);
}

template <bool kComposed, class T>
INLINE Row<T> row_of(const Problem<T>& p, int64_t id) {
    return {p.table + id * p.dim, kComposed ? p.intents + p.intent_of(id) * p.dim : nullptr};
}

template <class T>
INLINE void prefetch(const Problem<T>& p, int64_t id) {
    const char* row = reinterpret_cast<const char*>(p.table + id * p.dim);
    const int64_t bytes = std::min<int64_t>(p.dim * sizeof(T), 1024);  // of longer rows the hardware fetches the rest
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);  // to the second level: so many do not fit the first
}

// h . row for kCount rows
template <bool kComposed, int kCount, class T>
INLINE void dots(const float* h, const Row<T>* rows, int64_t dim, Vector* out) {
    Row<T> row[kCount];
    Vector sum[kCount] = {};
    for (int r = 0; r < kCount; ++r) row[r] = rows[r];
    int64_t x = 0;
    for (; x + W <= dim; x += W) {
        Vector left = load(h + x);
        for (int r = 0; r < kCount; ++r) sum[r] += left * at<kComposed>(row[r], x);
    }
    if (x < dim) {
        Vector left = load(h + x, dim - x);
        for (int r = 0; r < kCount; ++r) sum[r] += left * at<kComposed>(row[r], x, dim - x);
    }
    for (int r = 0; r < kCount; ++r) out[r] = sum[r];
}

template <bool kComposed, class T>
INLINE float dot(const float* h, const Row<T>& row, int64_t dim) {
    Vector sum;
    dots<kComposed, 1>(h, &row, dim, &sum);
    return sum_of(sum);
}

// The same for `count` <= W rows, a lane each; lanes from count on are anything.
template <bool kComposed, class T>
INLINE Vector dots_of(const float* h, const Row<T>* rows, int64_t count, int64_t dim) {
    Vector sum[W] = {};
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) dots<kComposed, 4>(h, rows + r, dim, sum + r);
    if (count - r >= 2) dots<kComposed, 2>(h, rows + r, dim, sum + r), r += 2;
    if (r < count) dots<kComposed, 1>(h, rows + r, dim, sum + r);
    Vector total = {};
    if (count <= 4) {
        for (int64_t l = 0; l < count; ++l) total[l] = sum_of(sum[l]);
        return total;
    }
    transpose(sum);
    for (int l = 0; l < W; ++l) total += sum[l];
    return total;
}

// out = sum over rows of factor * row (+ out)
template <bool kComposed, class T>
INLINE void add_rows(const Row<T>* rows, const float* factors, int64_t count, int64_t dim, bool add, float* out) {
    int64_t x = 0;
    for (; x + 4 * W <= dim; x += 4 * W) {
        Vector sum[4] = {};
        if (add)
            for (int v = 0; v < 4; ++v) sum[v] = load(out + x + v * W);
        for (int64_t r = 0; r < count; ++r)
            for (int v = 0; v < 4; ++v) sum[v] += factors[r] * at<kComposed>(rows[r], x + v * W);
        for (int v = 0; v < 4; ++v) store(out + x + v * W, sum[v]);
    }
    for (; x < dim; x += W) {
        Vector sum = add ? load(out + x, dim - x) : Vector{};
        for (int64_t r = 0; r < count; ++r) sum += factors[r] * at<kComposed>(rows[r], x, dim - x);
        store(out + x, sum, dim - x);
    }
}

// One token's loss from its logits: the positive's, and x of `count` (a multiple of W) with -inf where there is none. With
// `gradients`, x becomes the derivatives by x, and *dpositive that by the positive's.
template <class T>
INLINE float finish(const Problem<T>& p, float positive, float* x, int64_t count, bool gradients, float weight,
                    float* dpositive) {
    Vector total = {};
    if (p.softmax) {
        Vector highest = positive + Vector{};
        for (int64_t k = 0; k < count; k += W) highest = larger(load(x + k), highest);
        const float top = max_of(highest);
        for (int64_t k = 0; k < count; k += W) {
            Vector e = exponential(load(x + k) - top);
            total += e;
            store(x + k, e);
        }
        const float others = sum_of(total), own = std::exp(positive - top), scale = weight / (others + own);
        if (gradients) {
            for (int64_t k = 0; k < count; k += W) store(x + k, load(x + k) * scale);
            *dpositive = -others * scale;
        }
        return top == positive ? std::log1p(others) : top - positive + std::log(others + own);
    }
    for (int64_t k = 0; k < count; k += W) {
        Vector logit = load(x + k), e = exponential(logit > 0 ? -logit : logit);
        total += (logit > 0 ? logit : Vector{}) + log_of_one_and(e);
        if (gradients) store(x + k, weight * p.negative_weight * ((logit > 0 ? 1.0f + Vector{} : e) / (1.0f + e)));
    }
    const float e = std::exp(-std::abs(positive));
    if (gradients) *dpositive = -weight * p.positive_weight * (positive > 0 ? e : 1) / (1 + e);
    return p.positive_weight * (std::max(-positive, 0.0f) + std::log1p(e)) + p.negative_weight * sum_of(total);
}

// The logits of W negatives, from their products with h: less log q, and -inf for those that do not count.
INLINE Vector logits_of(Vector products, int64_t positive, const int32_t* ids, const uint8_t* ignore,
                        const float* log_q, int64_t count) {
    Ints id = *reinterpret_cast<const UnalignedInts*>(ids);  // negative beyond the last
    Ints hidden = (id == int32_t(positive)) | (id < 0);
    if (ignore) {
        uint8_t part[W] = {};
        if (count < W) {
            for (int64_t l = 0; l < count; ++l) part[l] = ignore[l];
            ignore = part;
        }
        hidden |= __builtin_convertvector(*reinterpret_cast<const Bytes*>(ignore), Ints) != 0;
    }
    if (log_q) products -= load(log_q, count);
    return hidden ? Vector{} - std::numeric_limits<float>::infinity() : products;
}

INLINE void narrow(const int64_t* ids, int64_t count, int64_t padded, int32_t* out) {
    for (int64_t k = 0; k < count; ++k) out[k] = int32_t(ids[k]);
    for (int64_t k = count; k < padded; ++k) out[k] = -1;
}

// Negatives a token: rows are read where they lie, the positive's after the negatives'; the logits' derivatives are kept for
// the table's gradient.
template <bool kComposed, class T>
TARGET void tokens(const Problem<T>& p, int64_t begin, int64_t end) {
    const int64_t count = p.negatives, padded = (count + W) / W * W, all = p.tokens * count;
    const int64_t ahead = 64, tokens_ahead = 1 + ahead / (count + 1);
    std::vector<Row<T>> rows(padded);
    std::vector<float> x(padded);
    std::vector<int32_t> ids(padded);
    for (int64_t t = begin; t < end; ++t) {
        const float* h = p.h + t * p.dim;
        const int64_t first = t * count;
        if (t + tokens_ahead < p.tokens) prefetch(p, p.positives[t + tokens_ahead]);
        narrow(p.ids + first, count, padded, ids.data());
        float positive = 0, dpositive = 0;
        for (int64_t k = 0; k <= count; k += W) {
            const int64_t n = std::min<int64_t>(W, count - k), next = std::min(all, first + k + ahead + n);
            for (int64_t i = first + k + ahead; i < next; ++i) prefetch(p, p.ids[i]);
            for (int64_t r = 0; r < n; ++r) rows[k + r] = row_of<kComposed>(p, p.ids[first + k + r]);
            if (n < W) rows[count] = row_of<kComposed>(p, p.positives[t]);
            Vector products = dots_of<kComposed>(h, rows.data() + k, std::min<int64_t>(W, n + 1), p.dim);
            if (n < W) positive = products[n];
            store(x.data() + k, logits_of(products, p.positives[t], ids.data() + k, p.ignore ? p.ignore_row(t) + k : nullptr,
                                   p.negative_log_q ? p.negative_log_q + first + k : nullptr, n));
        }
        if (p.positive_log_q) positive -= p.positive_log_q[t];
        p.losses[t] = finish(p, positive, x.data(), padded, p.dh, p.weights ? p.weights[t] : 1, &dpositive);
        if (!p.dh) continue;
        x[count] = dpositive;
        add_rows<kComposed>(rows.data(), x.data(), count + 1, p.dim, false, p.dh + t * p.dim);
        p.coefficients[t] = dpositive;
        std::copy_n(x.data(), count, p.coefficients + p.tokens + first);
    }
}

// Negatives that tokens begin ... end - 1 share, by matrix products; `sums` (negatives, stride) receives their gradient rows.
template <bool kComposed, class T>
TARGET void shared(const Problem<T>& p, int64_t group, int64_t begin, int64_t end, float* sums, int64_t stride) {
    const int64_t count = p.negatives, dim = p.dim, padded = (count + W - 1) / W * W;
    const int64_t vectors = (dim + W - 1) / W, columns = vectors * W, wide = (dim + kPanel - 1) / kPanel * kPanel;
    if (begin == end) {
        if (p.dh) std::fill_n(sums, count * stride, 0.0f);
        return;
    }
    std::vector<float> gathered(count * columns), by_column((count + kPanel) * dim), by_row(p.dh ? count * wide : 0);
    std::vector<float> logits(kTokens * padded), h_panels(kTokens * wide), dh(kRows * columns), dpositive(kTokens);
    std::vector<int32_t> ids(padded);
    const int64_t* negatives = p.ids + group * count;
    narrow(negatives, count, padded, ids.data());
    for (int64_t k = 0; k < count; ++k) {
        if (k + 16 < count) prefetch(p, negatives[k + 16]);
        const Row<T> row = row_of<kComposed>(p, negatives[k]);
        for (int64_t x = 0; x < dim; x += W) store(gathered.data() + k * columns + x, at<kComposed>(row, x, dim - x));
    }
    const Right transposed = pack_transposed(gathered.data(), columns, count, dim, by_column.data());
    const Right by_rows = p.dh ? pack(gathered.data(), columns, count, dim, by_row.data()) : Right{};

    for (int64_t first = begin; first < end; first += kTokens) {
        const int64_t n = std::min(kTokens, end - first);
        for (int64_t strip = 0; strip < n; strip += kRows)
            multiply<false>(std::min<int64_t>(kRows, n - strip), padded / W, dim, p.h + (first + strip) * dim, dim,
                            transposed, kOnes, false, logits.data() + strip * padded, padded);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t t = first + i;
            float* x = logits.data() + i * padded;
            if (t + 8 < p.tokens) prefetch(p, p.positives[t + 8]);
            for (int64_t k = 0; k < count; k += W)
                store(x + k, logits_of(load(x + k), p.positives[t], ids.data() + k, p.ignore ? p.ignore_row(t) + k : nullptr,
                                       p.negative_log_q ? p.negative_log_q + group * count + k : nullptr, count - k));
            const Row<T> own = row_of<kComposed>(p, p.positives[t]);
            float positive = dot<kComposed>(p.h + t * dim, own, dim);
            if (p.positive_log_q) positive -= p.positive_log_q[t];
            p.losses[t] = finish(p, positive, x, padded, p.dh, p.weights ? p.weights[t] : 1, dpositive.data() + i);
        }
        if (!p.dh) continue;
        for (int64_t strip = 0; strip < n; strip += kRows) {
            const int64_t rows = std::min<int64_t>(kRows, n - strip);
            multiply<false>(rows, vectors, count, logits.data() + strip * padded, padded, by_rows, kOnes, false, dh.data(),
                            columns);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t t = first + strip + i;
                const Row<T> own = row_of<kComposed>(p, p.positives[t]);
                add_rows<kComposed>(&own, dpositive.data() + strip + i, 1, dim, true, dh.data() + i * columns);
                std::copy_n(dh.data() + i * columns, dim, p.dh + t * dim);
                p.coefficients[t] = dpositive[strip + i];
            }
        }
        const Right h = pack(p.h + first * dim, dim, n, dim, h_panels.data());
        for (int64_t k = 0; k < count; k += kRows)
            multiply<true>(std::min<int64_t>(kRows, count - k), vectors, n, logits.data() + k, padded, h, kOnes, first > begin,
                           sums + k * stride, stride);
    }
}

// Segment s of the sorted entries is summed into one row of `out`, in order.
TARGET inline void sum_segments(const Sums& s, int64_t begin, int64_t end) {
    for (int64_t segment = begin; segment < end; ++segment) {
        const int32_t* entries = s.order + s.starts[segment];
        const int64_t count = s.starts[segment + 1] - s.starts[segment];
        float* out = s.out + (s.targets ? s.targets[segment] : segment) * s.dim;
        for (int64_t place = s.starts[segment]; place < s.starts[segment + 1]; ++place) s.prefetch(place);
        int64_t x = 0;
        for (; x + 4 * W <= s.dim; x += 4 * W) {
            Vector sum[4] = {};
            for (int64_t e = 0; e < count; ++e) {
                const Entry entry = s.entry(entries[e]);
                for (int v = 0; v < 4; ++v) sum[v] += entry.factor * load(entry.row + x + v * W);
            }
            for (int v = 0; v < 4; ++v) store(out + x + v * W, sum[v] * s.scale);
        }
        for (; x < s.dim; x += W) {
            Vector sum = {};
            for (int64_t e = 0; e < count; ++e) {
                const Entry entry = s.entry(entries[e]);
                sum += entry.factor * load(entry.row + x, s.dim - x);
            }
            store(out + x, sum * s.scale, s.dim - x);
        }
    }
}

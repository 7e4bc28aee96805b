// Sampled losses: one positive and K negatives a token in place of the whole catalog (see cafe_kernels/losses/reference.py).
//   s = h_t . E[positive] - log q,  s_k = h_t . E[negative k] - log q_k,  E[v] = table[v] (+ intents[item_intent[v]])
//   softmax   loss_t = log(e^s + sum_k e^s_k) - s             c = e^s / sum - 1             c_k = e^s_k / sum
//   bce       loss_t = a softplus(-s) + b sum_k softplus(s_k)  c = -a sigma(-s)              c_k = b sigma(s_k)
// c are the derivatives by the logits, and with them
//   dh_t = c E[positive] + sum_k c_k E[negative k]      dE[v] = sum of c h_t over the places where v is drawn.
// A negative that equals the positive, or is ignored, has s_k = -inf, so it adds nothing to either.
//
// dE is made without atomics: the drawn ids are sorted together with the numbers of their places (the "entries"), and
// each distinct id's row is summed by one thread, in the order of the places. Negatives that many tokens share are
// multiplied as matrices; their rows' sums over the tokens of one of a fixed number of parts are the entries then.
// No number depends on how many threads there are.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "arrays.h"
#include "cpu.h"
#include "parallel.h"

namespace cafe {
namespace {

constexpr int64_t kTokens = 64;        // in a block
constexpr int64_t kSegments = 128;     // in a block
constexpr int64_t kMaxParts = 4096;    // of the tokens that share their negatives
constexpr double kPerThread = 4e6;     // multiply-adds that are worth a thread
constexpr int64_t kMaxId = std::numeric_limits<int32_t>::max();

enum class Drawn { per_token, per_sequence, once };  // the negatives

template <class T>
struct Problem {
    Drawn drawn;
    int64_t tokens, dim, negatives, intent_count;
    const float* h;
    const T *table, *intents;  // intents null: not composed
    const int64_t *item_intent, *positives, *ids;  // ids (rows, negatives)
    const int64_t* sequence;  // (tokens) or null: rows of ids where they are per sequence, and of ignore
    const uint8_t* ignore;                         // (rows, negatives) or null
    const float *positive_log_q, *negative_log_q, *weights;  // null: 0, 0, 1
    bool softmax;
    float positive_weight, negative_weight;
    float *losses, *dh, *coefficients;  // dh null: no gradients
    const uint8_t* ignore_row(int64_t t) const { return ignore + (sequence ? sequence[t] : t) * negatives; }
    int64_t intent_of(int64_t id) const {
        if (uint64_t(item_intent[id]) < uint64_t(intent_count)) return item_intent[id];
        throw std::out_of_range("item_intent must be in 0 ... " + std::to_string(intent_count - 1) +
                                ", the rows of the intents' table, got " + std::to_string(item_intent[id]) + " for item " +
                                std::to_string(id));
    }
};

struct Entry {
    const float* row;
    float factor;
};

struct Sums {
    int64_t dim, tokens, negatives, entries, factors, stride;
    const int32_t* order;
    const int64_t *starts, *targets;  // targets null: segment i goes to row i
    const float *h, *coefficients, *rows;
    float scale;
    float* out;
    const float* row(int64_t e) const {
        if (e >= factors) return rows + (e - factors) * stride;
        return h + (e < tokens ? e : uint32_t(e - tokens) / uint32_t(negatives)) * dim;
    }
    Entry entry(int64_t e) const { return {row(e), e < factors ? coefficients[e] : 1}; }
    void prefetch(int64_t place) const {  // what comes some places after it in `order`
        if (place + 16 < entries) __builtin_prefetch(coefficients + order[place + 16]);
        if (place + 8 >= entries) return;
        const float* next = row(order[place + 8]);
        for (int64_t x = 0; x < std::min<int64_t>(dim, 256); x += 16) __builtin_prefetch(next + x);
    }
};

#define CAFE_KERNEL "losses_kernel.h"
#include "each_isa.h"

template <bool kComposed, class T>
void run(Isa isa, const Problem<T>& p, int64_t parts, float* sums, int64_t stride, int64_t threads) {
    const double work = 3.0 * double(p.tokens) * double(p.negatives + 1) * double(p.dim);
    threads = std::min(threads, int64_t(work / kPerThread) + 1);
    if (p.drawn == Drawn::per_token) {
        parallel_for((p.tokens + kTokens - 1) / kTokens, threads, [&](int64_t block) {
            const int64_t begin = block * kTokens, end = std::min(p.tokens, begin + kTokens);
            CAFE_DISPATCH(isa, tokens<kComposed>(p, begin, end));
        });
        return;
    }
    parallel_for(parts, threads, [&](int64_t part) {
        int64_t row = 0, begin = part * p.tokens / parts, end = (part + 1) * p.tokens / parts;
        if (p.drawn == Drawn::per_sequence) {
            row = part;
            const auto [first, last] = std::equal_range(p.sequence, p.sequence + p.tokens, row);
            begin = first - p.sequence, end = last - p.sequence;
        }
        CAFE_DISPATCH(isa, shared<kComposed>(p, row, begin, end, sums ? sums + part * p.negatives * stride : sums, stride));
    });
}

// What follows checks the arguments.

void expect_ids(const char* name, const Array<int64_t>& ids, int64_t limit, const char* of) {
    const int64_t *at = ids.data(), n = ids.size();
    uint64_t worst = 0;
    for (int64_t i = 0; i < n; ++i) worst = std::max(worst, uint64_t(at[i]));  // a negative id is the largest of all
    if (n == 0 || worst < uint64_t(limit)) return;
    int64_t i = 0;
    while (uint64_t(at[i]) < uint64_t(limit)) ++i;
    throw std::out_of_range(std::string(name) + " must be in 0 ... " + std::to_string(limit - 1) + ", " + of + ", got " +
                            std::to_string(at[i]) + " at place " + std::to_string(i));
}

template <class T, class Word>
double sampled_loss(Array<float> h, Array<Word> table, Maybe<Word> intents, Maybe<int64_t> item_intent, Array<int64_t> positives,
                  Array<int64_t> negatives, Maybe<int64_t> sequence, Maybe<bool> ignore, Maybe<float> positive_log_q,
                  Maybe<float> negative_log_q, Maybe<float> weights, Array<float> losses, Maybe<float> dh,
                  Maybe<float> coefficients, Maybe<float> negative_rows, bool softmax, float positive_weight,
                  float negative_weight, int64_t parts, int64_t threads, const std::string& isa_name) {
    const Isa isa = choose_isa(isa_name);
    if (h.ndim() != 2) throw std::invalid_argument("h must be (tokens, dim), got shape " + shape_of(h));
    if (table.ndim() != 2 || table.shape(1) != h.shape(1))
        throw std::invalid_argument("table must be (items, dim = " + std::to_string(h.shape(1)) + "), got shape " + shape_of(table));
    if (negatives.ndim() < 1 || negatives.ndim() > 2)
        throw std::invalid_argument("negatives must be (K) or (rows, K), got shape " + shape_of(negatives));
    expect_threads(threads);
    Problem<T> p;
    p.tokens = h.shape(0), p.dim = h.shape(1), p.negatives = negatives.shape(negatives.ndim() - 1);
    p.drawn = negatives.ndim() == 1 ? Drawn::once : sequence ? Drawn::per_sequence : Drawn::per_token;
    const bool per_token = p.drawn == Drawn::per_token, per_sequence = p.drawn == Drawn::per_sequence;
    const int64_t items = table.shape(0);
    if (items > kMaxId) throw std::invalid_argument("table may have 2^31 - 1 rows, got " + std::to_string(items));
    expect("positives", positives, {p.tokens});
    if (per_token) expect("negatives", negatives, {p.tokens, p.negatives});
    expect_ids("positives", positives, items, "the rows of table");
    expect_ids("negatives", negatives, items, "the rows of table");
    if (intents.has_value() != item_intent.has_value())
        throw std::invalid_argument("intents and item_intent must both be given, or neither");
    if (intents) {
        if (intents->ndim() != 2 || intents->shape(1) != p.dim)
            throw std::invalid_argument("intents must be (intents, dim = " + std::to_string(p.dim) + "), got shape " + shape_of(*intents));
        expect("item_intent", *item_intent, {items});
    }
    const int64_t rows = per_sequence ? negatives.shape(0) : !sequence ? p.tokens : ignore && ignore->ndim() ? ignore->shape(0) : kMaxId;
    if (ignore) expect("ignore", *ignore, {rows, p.negatives});
    if (sequence) {
        expect("sequence", *sequence, {p.tokens});
        expect_ids("sequence", *sequence, rows, "the rows of negatives or ignore");
        if (per_sequence && !std::is_sorted(sequence->data(), sequence->data() + p.tokens))
            throw std::invalid_argument("sequence must ascend, as packed tokens do");
    }
    if (positive_log_q) expect("positive_log_q", *positive_log_q, {p.tokens});
    if (negative_log_q)
        expect("negative_log_q", *negative_log_q, std::vector<int64_t>(negatives.shape(), negatives.shape() + negatives.ndim()));
    if (weights) expect("weights", *weights, {p.tokens});
    expect("losses", losses, {p.tokens});
    if (p.drawn == Drawn::once && (parts < 1 || parts > kMaxParts))
        throw std::invalid_argument("parts must be in 1 ... " + std::to_string(kMaxParts) + ", got " + std::to_string(parts));
    if (per_sequence && parts != rows)
        throw std::invalid_argument("parts must be the rows of negatives, got " + std::to_string(parts));
    int64_t stride = 0;
    if (dh) {
        if (!coefficients || !negative_rows) throw std::invalid_argument("dh, coefficients and negative_rows go together");
        expect("dh", *dh, {p.tokens, p.dim});
        expect("coefficients", *coefficients, {p.tokens + (per_token ? p.tokens * p.negatives : 0)});
        stride = (p.dim + 15) / 16 * 16;
        expect("negative_rows", *negative_rows, {per_token ? 0 : parts * p.negatives, stride});
    }
    auto words = [](const Array<Word>& x) { return reinterpret_cast<const T*>(x.data()); };
    p.h = h.data(), p.table = words(table), p.intents = intents ? words(*intents) : nullptr, p.item_intent = data(item_intent);
    p.intent_count = intents ? intents->shape(0) : 0;
    p.positives = positives.data(), p.ids = negatives.data(), p.sequence = data(sequence);
    p.ignore = ignore ? reinterpret_cast<const uint8_t*>(ignore->data()) : nullptr;
    p.positive_log_q = data(positive_log_q), p.negative_log_q = data(negative_log_q), p.weights = data(weights);
    p.softmax = softmax, p.positive_weight = positive_weight, p.negative_weight = negative_weight;
    p.losses = losses.mutable_data(), p.dh = dh ? dh->mutable_data() : nullptr;
    p.coefficients = dh ? coefficients->mutable_data() : nullptr;
    float* sums = dh ? negative_rows->mutable_data() : nullptr;
    py::gil_scoped_release release;
    if (intents) run<true>(isa, p, parts, sums, stride, threads);
    else run<false>(isa, p, parts, sums, stride, threads);
    double total = 0;
    for (int64_t t = 0; t < p.tokens; ++t) total += p.losses[t];
    return total;
}

// Sorts ids, stably, by a radix sort: `order` receives the places of the ascending ids, `distinct` the ids that occur, and
// `starts` where each begins in order, and after them their number. Returns how many occur.
int64_t sort_ids(Array<int64_t> ids, int64_t limit, Array<int32_t> order, Array<int64_t> distinct, Array<int64_t> starts) {
    const int64_t n = ids.size();
    if (limit < 0 || limit > kMaxId || n > kMaxId) throw std::invalid_argument("at most 2^31 - 1 ids below 2^31 can be sorted");
    expect("ids", ids, {n}), expect("order", order, {n}), expect("distinct", distinct, {n}), expect("starts", starts, {n + 1});
    expect_ids("ids", ids, limit, "the rows of table");
    const int64_t* id = ids.data();
    int32_t* places = order.mutable_data();
    int64_t *unique = distinct.mutable_data(), *first = starts.mutable_data();
    py::gil_scoped_release release;
    int bits = 1;
    while ((limit - 1) >> bits > 0) ++bits;
    const int passes = (bits + 10) / 11, digit = (bits + passes - 1) / passes;
    const uint64_t mask = (uint64_t(1) << digit) - 1;
    std::vector<uint64_t> from(n), to(n);
    for (int64_t i = 0; i < n; ++i) from[i] = uint64_t(id[i]) << 32 | uint64_t(i);
    for (int pass = 0; pass < passes; ++pass) {
        const int shift = 32 + pass * digit;
        std::vector<int64_t> next(mask + 2);
        for (uint64_t key : from) ++next[(key >> shift & mask) + 1];
        for (uint64_t d = 0; d < mask; ++d) next[d + 1] += next[d];
        for (uint64_t key : from) to[next[key >> shift & mask]++] = key;
        from.swap(to);
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t here = int64_t(from[i] >> 32);
        places[i] = int32_t(from[i]);
        if (i == 0 || here != unique[count - 1]) unique[count] = here, first[count++] = i;
    }
    first[count] = n;
    return count;
}

// out[targets[s]] = scale * the sum of the entries of segment s; without targets row s. Entries below len(coefficients) are
// a coefficient times a row of h (the first T ones the tokens in turn, then K for each token); the others are rows of `rows`.
void sum_segments(Array<int32_t> order, Array<int64_t> starts, int64_t segments, Maybe<int64_t> targets, Array<float> h,
                  Array<float> coefficients, Array<float> rows, double scale, Array<float> out, int64_t threads,
                  const std::string& isa_name) {
    const Isa isa = choose_isa(isa_name);
    expect_threads(threads);
    for (auto [name, x] : {std::pair<const char*, py::array>{"h", h}, {"rows", rows}, {"out", out}})
        if (x.ndim() != 2) throw std::invalid_argument(std::string(name) + " must be 2-D, got shape " + shape_of(x));
    Sums s;
    s.dim = out.shape(1), s.tokens = h.shape(0), s.factors = coefficients.size(), s.stride = rows.shape(1);
    s.negatives = s.tokens ? std::max<int64_t>(1, (s.factors - s.tokens) / s.tokens) : 1;
    const int64_t entries = s.entries = s.factors + rows.shape(0);
    if (entries > kMaxId) throw std::invalid_argument("at most 2^31 - 1 entries can be summed, got " + std::to_string(entries));
    const bool fits = s.factors == s.tokens || (s.factors > s.tokens && s.factors == s.tokens * (s.negatives + 1));
    if (!fits) throw std::invalid_argument("coefficients must be (T) or (T + T * K) for the T rows of h, got shape " + shape_of(coefficients));
    if (s.tokens && h.shape(1) != s.dim) throw std::invalid_argument("h must have out's " + std::to_string(s.dim) + " columns, got shape " + shape_of(h));
    if (s.stride < s.dim) throw std::invalid_argument("rows must have out's " + std::to_string(s.dim) + " columns, got shape " + shape_of(rows));
    expect("order", order, {entries});
    if (segments < 0 || starts.size() <= segments) throw std::invalid_argument("starts must have segments + 1 numbers, got shape " + shape_of(starts));
    if (targets && targets->size() < segments) throw std::invalid_argument("targets must have a row for each segment, got shape " + shape_of(*targets));
    if (!targets && out.shape(0) < segments) throw std::invalid_argument("out must have a row for each segment, got shape " + shape_of(out));
    s.order = order.data(), s.starts = starts.data(), s.targets = data(targets);
    for (int64_t e = 0; e < entries; ++e)
        if (uint32_t(s.order[e]) >= uint64_t(entries)) throw std::out_of_range("order must hold places 0 ... " + std::to_string(entries - 1));
    for (int64_t i = 0; i < segments; ++i) {
        if (s.starts[i] < 0 || s.starts[i] > s.starts[i + 1] || s.starts[i + 1] > entries)
            throw std::invalid_argument("starts must ascend within the " + std::to_string(entries) + " entries");
        if (s.targets && uint64_t(s.targets[i]) >= uint64_t(out.shape(0)))
            throw std::out_of_range("targets must be rows of out, which has " + std::to_string(out.shape(0)));
    }
    s.h = h.data(), s.coefficients = coefficients.data(), s.rows = rows.data(), s.scale = float(scale), s.out = out.mutable_data();
    py::gil_scoped_release release;
    threads = std::min(threads, int64_t(2 * double(entries) * double(s.dim) / kPerThread) + 1);
    parallel_for((segments + kSegments - 1) / kSegments, threads, [&](int64_t block) {
        const int64_t begin = block * kSegments, end = std::min(segments, begin + kSegments);
        CAFE_DISPATCH(isa, sum_segments(s, begin, end));
    });
}

template <class T, class Word>
void bind(py::module_& m) {
    m.def("sampled_loss", &sampled_loss<T, Word>, py::arg("h").noconvert(), py::arg("table").noconvert(),
          py::arg("intents").noconvert(), py::arg("item_intent").noconvert(), py::arg("positives").noconvert(),
          py::arg("negatives").noconvert(), py::arg("sequence").noconvert(), py::arg("ignore").noconvert(),
          py::arg("positive_log_q").noconvert(), py::arg("negative_log_q").noconvert(), py::arg("weights").noconvert(),
          py::arg("losses").noconvert(), py::arg("dh").noconvert(), py::arg("coefficients").noconvert(),
          py::arg("negative_rows").noconvert(), py::arg("softmax"), py::arg("positive_weight"), py::arg("negative_weight"),
          py::arg("parts"), py::arg("threads"), py::arg("isa") = "auto",
          "Fills losses and, if given, dh, coefficients and negative_rows; returns the sum of the losses. uint16 tables hold bfloat16.");
}

}  // namespace

void register_losses(py::module_& m) {
    bind<float, float>(m);
    bind<Bf16, uint16_t>(m);
    m.def("sort_ids", &sort_ids, py::arg("ids").noconvert(), py::arg("limit"), py::arg("order").noconvert(),
          py::arg("distinct").noconvert(), py::arg("starts").noconvert(), "Fills order, distinct and starts; returns how many ids are distinct.");
    m.def("sum_segments", &sum_segments, py::arg("order").noconvert(), py::arg("starts").noconvert(), py::arg("segments"),
          py::arg("targets").noconvert(), py::arg("h").noconvert(), py::arg("coefficients").noconvert(),
          py::arg("rows").noconvert(), py::arg("scale"), py::arg("out").noconvert(), py::arg("threads"), py::arg("isa") = "auto",
          "Fills a row of out for each segment.");
}

}  // namespace cafe

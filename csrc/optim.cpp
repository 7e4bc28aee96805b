// Adam (Kingma and Ba, 2015; weight decay decoupled as in Loshchilov and Hutter, 2019) on the rows that a sparse gradient
// touches. Step t of a row with gradient g:
//   m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2      c_t = sqrt(1 - beta2^t)
//   p = (1 - lr_t wd) p - lr_t c_t / (1 - beta1^t) * m / (sqrt(v) + c_t eps)
// (SparseAdam, the lazy mode: eps instead of c_t eps.) In the exact mode a row first makes up for the steps j = s + 1 ... n
// since its last one, s, in which its gradient was zero. With k = j - s, rho = beta1 / sqrt(beta2), they subtract
//   sum_j w_j rho^k m / (sqrt(v) + eps q_j),      w_j = lr_j c_j / (1 - beta1^j) * decay after j,      q_j = c_j beta2^(-k/2).
// Steps are grouped in blocks in which q varies little. A block's sum is, with the moments of q under the weights w rho^k,
//   W m / (sqrt(v) + E) * (1 + c2 z^2 - c3 z^3 + c4 z^4),      E = eps mean(q),      z = E / (sqrt(v) + E) <= 1,
// c_i the central moments of q / mean(q): the series of 1 / (sqrt(v) + eps q) about E. cafe_kernels/optim/history.py keeps the
// raw moments of each s up to its block's end, bounds the error, and says where the sum over blocks may stop.
//
// Duplicate rows of the gradient are summed in the order of their appearance, each row by one thread, so that no number
// depends on how many threads there are.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "arrays.h"
#include "parallel.h"
#include "philox.h"

namespace cafe {
namespace {

constexpr int64_t kBlock = 128;           // rows of a unit of work
constexpr int64_t kPerThread = 1 << 18;   // elements that are worth a thread
constexpr int64_t kAhead = 4;             // rows that are under way (prefetched) at once
constexpr int64_t kPowers = 1024;
constexpr double kNegligible = 0x1p-30;   // history.py: NEGLIGIBLE

// For writing: lines that are fetched for reading are asked for again when they are written. (GCC would not emit prefetchw for
// every x86, though all since 2004 take it, and drops calls of functions that only prefetch; hence the assembly.)
__attribute__((always_inline)) inline void prefetch(const void* line) {
#ifdef CAFE_X86
    asm volatile("prefetchw (%0)" : : "r"(line));
#else
    __builtin_prefetch(line, 1);
#endif
}

struct Term {  // of a block of skipped steps
    float weight, epsilon, c2, c3, c4;
};

struct Step {  // with a gradient, the same for all rows
    float one_minus_beta1, beta2, one_minus_beta2, decay, size, epsilon;
};

struct Row {
    const Step* step;
    int64_t ahead;    // elements from it to a row that comes soon
    int64_t gap = 0;  // skipped steps
    float decay, beta1_power, beta2_power;
    int64_t terms;
    const Term* term;
};

struct HistoryRow {  // of step s: moments over the steps after s, up to `next` (or now)
    double moment[5], log_decay, next, lr;
};

#define CAFE_KERNEL "optim_kernel.h"
#include "each_isa.h"

template <class T, class S>
void update_row(Isa isa, const Row& row, int64_t dim, T* p, S* m, S* v, const float* g, const uint16_t* random, int64_t stride) {
    CAFE_DISPATCH(isa, update_row(row, dim, p, m, v, g, random, stride));
}

// What the exact mode knows of the skipped steps.
class History {
   public:
    History(const HistoryRow* rows, int64_t first, int64_t now, double beta1, double beta2, double epsilon)
        : rows_(rows), first_(first), now_(now), beta1_(beta1), beta2_(beta2), epsilon_(epsilon) {
        const int64_t count = std::min(now - first, kPowers) + 1;
        power1_.resize(count, 1), power2_.resize(count, 1);
        for (int64_t k = 1; k < count; ++k) power1_[k] = power1_[k - 1] * beta1, power2_[k] = power2_[k - 1] * beta2;
    }

    // Fills in what a row that was last updated at step s has to make up for.
    void catch_up(int64_t s, Row& row, std::vector<Term>& terms) const {
        if (s < first_ || s > now_)
            throw std::invalid_argument("last_step holds " + std::to_string(s) + ", expected " + std::to_string(first_) +
                                        " ... " + std::to_string(now_) + ": the state is of another run, or was altered");
        row.gap = now_ - s;
        if (!row.gap) return;
        const double momentum = power(power1_, beta1_, row.gap);
        row.beta1_power = momentum < 1e-20 ? 0 : float(momentum);  // no denormals
        row.beta2_power = float(power(power2_, beta2_, row.gap));
        row.decay = decay_since(s);
        terms.clear();
        for (int64_t at = s; at < now_ && s > 0;) {  // s = 0: never touched, no momentum
            const HistoryRow& h = rows_[at - first_];
            if (!(h.next >= double(at + 1))) throw std::invalid_argument("history is damaged at step " + std::to_string(at));
            const int64_t end = int64_t(std::min(h.next, double(now_)));
            const double root = std::sqrt(power(power2_, beta2_, at - s)), rho = power(power1_, beta1_, at - s) / root;
            if (!(rho > kNegligible)) break;
            if (h.moment[0] > 0) {
                const double mean = h.moment[1] / h.moment[0];
                double a[5], scale = h.moment[0];
                for (int i = 2; i < 5; ++i) a[i] = h.moment[i] / ((scale *= mean) * mean);
                terms.push_back({float(h.moment[0] * rho * decay_since(end)), float(epsilon_ * mean / root), float(a[2] - 1),
                                 float(a[3] - 3 * a[2] + 2), float(a[4] - 4 * a[3] + 6 * a[2] - 3)});
            }
            at = end;
        }
        row.term = terms.data(), row.terms = int64_t(terms.size());
    }

   private:
    static double power(const std::vector<double>& table, double beta, int64_t k) {
        return k < int64_t(table.size()) ? table[k] : std::pow(beta, double(k));
    }
    double decay_since(int64_t s) const {
        const double log_decay = rows_[now_ - first_].log_decay - rows_[s - first_].log_decay;
        return log_decay == 0 ? 1 : std::exp(log_decay);
    }

    const HistoryRow* rows_;
    int64_t first_, now_;
    double beta1_, beta2_, epsilon_;
    std::vector<double> power1_, power2_;
};

// The gradient's rows in ascending order, equal ones in order of appearance: row << 32 | position, by a radix sort.
std::vector<uint64_t> sort_rows(const int64_t* rows, int64_t n, int64_t table_rows) {
    std::vector<uint64_t> keys(n);
    bool sorted = true;
    for (int64_t i = 0; i < n; ++i) {
        if (rows[i] < 0 || rows[i] >= table_rows)
            throw std::invalid_argument("the gradient has row " + std::to_string(rows[i]) + ", but the table has rows 0 ... " +
                                        std::to_string(table_rows - 1));
        keys[i] = uint64_t(rows[i]) << 32 | uint64_t(i);
        sorted &= i == 0 || rows[i - 1] <= rows[i];
    }
    if (sorted) return keys;
    int bits = 1;
    while ((table_rows - 1) >> bits) ++bits;
    const int passes = (bits + 10) / 11, digit = (bits + passes - 1) / passes;
    const uint64_t mask = (uint64_t(1) << digit) - 1;
    std::vector<uint64_t> other(n);
    for (int shift = 32; shift < 32 + bits; shift += digit, keys.swap(other)) {
        std::vector<int64_t> place(mask + 2);
        for (uint64_t key : keys) ++place[(key >> shift & mask) + 1];
        for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
        for (uint64_t key : keys) other[place[key >> shift & mask]++] = key;
    }
    return keys;
}

float to_float(float x) { return x; }
float to_float(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T, class S>
struct Table {
    int64_t rows, dim;
    T* p;
    S *m, *v;
    int32_t* last_step;  // null: lazy
};

struct Options {
    Step step;
    int64_t number;  // of the step
    std::optional<uint64_t> seed;  // of stochastic rounding
    int64_t threads;
    Isa isa;
};

// Memory of one thread.
struct Room {
    std::vector<float> sum;
    std::vector<uint64_t> random;
    std::vector<Term> terms;
};

template <class T, class S, class G>
class Updater {
   public:
    Updater(const Table<T, S>& table, const History* history, const G* values, const Options& options)
        : table_(table), history_(history), values_(values), options_(options), quads_((table.dim + 15) / 16 * 4) {}

    // All rows.
    void run() const {
        for_blocks(table_.rows, [&](int64_t first, int64_t last, Room& room) {
            for (int64_t row = first; row < last; ++row) update(row, row, nullptr, room);
        });
    }

    // The rows of `keys`, which are sorted.
    void run(const std::vector<uint64_t>& keys) const {
        std::vector<int64_t> starts;  // of equal rows
        starts.reserve(keys.size() + 1);
        for (size_t i = 0; i < keys.size(); ++i)
            if (i == 0 || keys[i] >> 32 != keys[i - 1] >> 32) starts.push_back(int64_t(i));
        starts.push_back(int64_t(keys.size()));
        const int64_t n = int64_t(starts.size()) - 1;
        auto row_of = [&](int64_t i) { return int64_t(keys[starts[i]] >> 32); };
        for_blocks(n, [&](int64_t first, int64_t last, Room& room) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t ahead = std::min(i + kAhead, last - 1);
                if (values_) prefetch_row(values_ + int64_t(uint32_t(keys[starts[ahead]])) * table_.dim);
                if (table_.last_step && i + 4 * kAhead < last) __builtin_prefetch(table_.last_step + row_of(i + 4 * kAhead), 1);
                update(row_of(i), row_of(ahead), values_ ? sum(keys.data() + starts[i], starts[i + 1] - starts[i], room) : nullptr,
                       room);
            }
        });
    }

   private:
    template <class F>
    void for_blocks(int64_t n, const F& f) const {
        const int64_t threads = std::min(options_.threads, n * table_.dim / kPerThread + 1);
        parallel_for((n + kBlock - 1) / kBlock, threads, [&](int64_t block) {
            static thread_local Room room;
            room.sum.resize(table_.dim), room.random.resize(3 * quads_ + 8);
            f(block * kBlock, std::min((block + 1) * kBlock, n), room);
        });
    }

    void prefetch_row(const G* x) const {
        for (int64_t i = 0; i < table_.dim; i += 64 / sizeof(G)) prefetch(x + i);
    }

    const float* sum(const uint64_t* keys, int64_t count, Room& room) const {
        auto value = [&](int64_t i) { return values_ + int64_t(uint32_t(keys[i])) * table_.dim; };
        if constexpr (std::is_same_v<G, float>)
            if (count == 1) return value(0);
        float* sum = room.sum.data();
        for (int64_t x = 0; x < table_.dim; ++x) sum[x] = to_float(value(0)[x]);
        for (int64_t i = 1; i < count; ++i)
            for (int64_t x = 0; x < table_.dim; ++x) sum[x] += to_float(value(i)[x]);
        return sum;
    }

    void update(int64_t number, int64_t next, const float* g, Room& room) const {
        Row row;
        row.step = &options_.step, row.ahead = (next - number) * table_.dim;
        if (history_) history_->catch_up(table_.last_step[number], row, room.terms);
        if (!row.gap && !g) return;
        const uint16_t* random = nullptr;
        if (options_.seed) {
            // Three numbers of 16 bits an element, for p, m and v: 4 elements share the 64 bits of one position.
            philox_bits(options_.isa, *options_.seed, uint64_t(number) * 3 * quads_, uint32_t(options_.number), kOptimizerStream,
                        int(3 * quads_ + 7) / 8 * 8, room.random.data());
            random = reinterpret_cast<const uint16_t*>(room.random.data());
        }
        const int64_t at = number * table_.dim;
        update_row(options_.isa, row, table_.dim, table_.p + at, table_.m + at, table_.v + at, g, random, 4 * quads_);
        if (table_.last_step) table_.last_step[number] = int32_t(options_.number);
    }

    Table<T, S> table_;
    const History* history_;
    const G* values_;
    Options options_;
    int64_t quads_;  // groups of 4 elements of a row, a multiple of 4
};

// What follows checks the arguments.

std::string describe(const py::handle& value) { return py::str(value); }

// uint16 holds bfloat16.
bool is_half(const char* name, const py::array& a) {
    if (!(a.flags() & py::array::c_style) || !is_aligned(a))
        throw std::invalid_argument(std::string(name) + " must be C-contiguous and aligned");
    if (py::isinstance<py::array_t<uint16_t>>(a)) return true;
    if (py::isinstance<py::array_t<float>>(a)) return false;
    throw py::type_error(std::string(name) + " must be float32, or bfloat16 as uint16, got " + describe(a.dtype()));
}

// f(a value of type float or Bf16)
template <class F>
void with_type(bool half, const F& f) {
    half ? f(Bf16{}) : f(float{});
}

void adam_rows(py::array table, py::array exp_avg, py::array exp_avg_sq, Maybe<int32_t> last_step, Maybe<double> history,
               Maybe<int64_t> rows, std::optional<py::array> values, int64_t first, int64_t number, double lr, double beta1, double beta2,
               double epsilon, double weight_decay, std::optional<uint64_t> seed, int64_t threads, const std::string& isa) {
    if (table.ndim() != 2) throw std::invalid_argument("table must be (V, d), got shape " + shape_of(table));
    if (number < 0 || number >= int64_t(1) << 31)
        throw std::invalid_argument("step must be in 0 ... 2^31 - 1, got " + std::to_string(number));
    const int64_t v = table.shape(0), d = table.shape(1), now = values ? number - 1 : number;
    if (v > int64_t(1) << 31) throw std::invalid_argument("table must have at most 2^31 rows, got " + std::to_string(v));
    expect("exp_avg", exp_avg, {v, d}), expect("exp_avg_sq", exp_avg_sq, {v, d});
    const bool half = is_half("table", table), half_moments = is_half("exp_avg", exp_avg);
    if (is_half("exp_avg_sq", exp_avg_sq) != half_moments) throw std::invalid_argument("exp_avg and exp_avg_sq differ in dtype");
    expect_threads(threads);
    if (!(0 <= first && first <= now))
        throw std::invalid_argument("steps must ascend, got " + std::to_string(first) + ", " + std::to_string(number));
    if (last_step.has_value() != history.has_value())
        throw std::invalid_argument("last_step and history must both be given, or neither");
    if (last_step) expect("last_step", *last_step, {v});
    if (history && (history->ndim() != 2 || history->shape(0) <= now - first || history->shape(1) != 8))
        throw std::invalid_argument("history must be (n > " + std::to_string(now - first) + ", 8), got " + shape_of(*history));
    if (values && !rows) throw std::invalid_argument("values need rows");
    if (rows && (rows->ndim() != 1 || rows->size() >= int64_t(1) << 32))
        throw std::invalid_argument("rows must be 1-D and fewer than 2^32, got " + shape_of(*rows));
    if (values) expect("values", *values, {rows->size(), d});
    const bool half_values = values && is_half("values", *values);

    Options options;
    const double correction1 = 1 - std::pow(beta1, double(number)), root = std::sqrt(1 - std::pow(beta2, double(number)));
    options.step = {float(1 - beta1), float(beta2), float(1 - beta2), float(1 - lr * weight_decay),
                    float(lr * root / correction1), float(history ? epsilon * root : epsilon)};
    options.number = number, options.seed = seed, options.threads = threads, options.isa = choose_isa(isa);
    if (!half && !half_moments) options.seed.reset();
    int32_t* last = last_step ? last_step->mutable_data() : nullptr;
    auto past = history ? reinterpret_cast<const HistoryRow*>(history->data()) : nullptr;
    void *p = table.mutable_data(), *m = exp_avg.mutable_data(), *s = exp_avg_sq.mutable_data();
    const void* g = values ? values->data() : nullptr;
    const int64_t *row = rows ? rows->data() : nullptr, n = rows ? rows->size() : 0;
    py::gil_scoped_release release;
    std::vector<uint64_t> keys;
    if (row) keys = sort_rows(row, n, v);
    std::optional<History> skipped;
    if (past) skipped.emplace(past, first, now, beta1, beta2, epsilon);
    with_type(half, [&](auto t) {
        with_type(half_moments, [&](auto u) {
            with_type(half_values, [&](auto w) {
                using T = decltype(t);
                using S = decltype(u);
                using G = decltype(w);
                const Table<T, S> whole{v, d, static_cast<T*>(p), static_cast<S*>(m), static_cast<S*>(s), last};
                const Updater<T, S, G> updater(whole, skipped ? &*skipped : nullptr, static_cast<const G*>(g), options);
                row ? updater.run(keys) : updater.run();
            });
        });
    });
}

// Random rows of a large table miss the TLB too: asks for huge pages, with `collapse` for memory that was already written (Linux 6.1
// copies it). The contents stay as they are, and a refusal does no harm.
void use_huge_pages([[maybe_unused]] py::array a, [[maybe_unused]] bool collapse) {
#ifdef __linux__
    constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
    auto begin = (reinterpret_cast<uintptr_t>(a.data()) + kHugePage - 1) / kHugePage * kHugePage;
    auto end = (reinterpret_cast<uintptr_t>(a.data()) + a.nbytes()) / kHugePage * kHugePage;
    if (begin >= end) return;
    py::gil_scoped_release release;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
    if (collapse) madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

// history.py's `append`, but for the making of rows: the moments of the rows `block` ... step - 1, and row `step`.
void append_step(Array<double> history, Array<double> powers, int64_t first, int64_t block, int64_t step, double c, double weight,
                 double decay, double lr) {
    if (history.ndim() != 2 || history.shape(1) != 8 || powers.ndim() != 2 || powers.shape(1) != 5)
        throw std::invalid_argument("history must be (n, 8), and powers (length, 5)");
    const int64_t length = powers.shape(0);
    if (!(0 <= first && first <= block && block < step && step - block <= length && step - first < history.shape(0)))
        throw std::invalid_argument("steps must ascend and lie in the history");
    auto rows = reinterpret_cast<HistoryRow*>(history.mutable_data());
    const int64_t begin = block - first, end = step - first;
    const double* power = powers.data() + (length - (end - begin)) * 5;
    for (int64_t s = begin; s < end; ++s, power += 5) {
        double x = weight;
        for (int i = 0; i < 5; ++i, x *= c) rows[s].moment[i] = rows[s].moment[i] * decay + x * power[i];
    }
    rows[end].log_decay = rows[end - 1].log_decay + std::log(decay);
    rows[end].lr = lr;
}

}  // namespace

void register_optim(py::module_& m) {
    m.def("append_step", &append_step, py::arg("history").noconvert(), py::arg("powers").noconvert(), py::arg("first"),
          py::arg("block"), py::arg("step"), py::arg("c"), py::arg("weight"), py::arg("decay"), py::arg("lr"),
          "Adds a step to the exact mode's history; see cafe_kernels/optim/history.py.");
    m.def("use_huge_pages", &use_huge_pages, py::arg("array"), py::arg("collapse"),
          "Asks the system for huge pages under the array, which may be written already if `collapse`.");
    m.def("adam_rows", &adam_rows, py::arg("table").noconvert(), py::arg("exp_avg").noconvert(),
          py::arg("exp_avg_sq").noconvert(), py::arg("last_step").noconvert(), py::arg("history").noconvert(),
          py::arg("rows").noconvert(), py::arg("values").noconvert(), py::arg("first"), py::arg("step"), py::arg("lr"),
          py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("seed"), py::arg("threads"),
          py::arg("isa") = "auto",
          "Updates table, exp_avg, exp_avg_sq and last_step in place; see cafe_kernels.optim. uint16 arrays hold bfloat16.");
}

}  // namespace cafe

// Draws item ids from a fixed law p in O(1) each: the alias table of Walker (1977), built in O(V) as by Vose (1991).
// The table splits [0, 1) into V columns of equal width; column i belongs to item i up to a threshold and to its alias
// above. A draw is one 64-bit Philox number x: x * V / 2^64 has the column in front of the point, and behind it the
// height in the column. At V in the millions a draw costs one cache miss, and little else: columns are computed and
// prefetched a chunk ahead of their use.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "arrays.h"
#include "parallel.h"
#include "philox.h"

namespace cafe {
namespace {

struct Entry {  // one column: threshold and alias lie together, so that a draw touches one cache line
    uint32_t threshold;  // times 2^-32
    int32_t alias;
};

constexpr int kChunk = 128;             // draws that are under way (prefetched) at once
constexpr int64_t kBlock = 4096;        // draws of a unit of work; its results stay in the first-level cache
constexpr int64_t kPerThread = 65536;   // fewer draws than this are not worth a thread
constexpr uint32_t kAttempts = 256;     // rejections before a row goes over to an exact search

// Memory on huge pages where the system grants them: random reads of a large table otherwise miss the TLB too.
template <class T>
std::unique_ptr<T[], void (*)(void*)> allocate(size_t n) {
    constexpr size_t kHugePage = size_t(1) << 21;
    size_t alignment = n * sizeof(T) < kHugePage ? 64 : kHugePage;
    size_t bytes = (n * sizeof(T) + alignment - 1) / alignment * alignment;
    void* memory = std::aligned_alloc(alignment, bytes);
    if (!memory) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return {static_cast<T*>(memory), std::free};
}

uint32_t quantise(double probability) {  // rounded, but a positive one stays positive: its item can still be drawn
    if (probability <= 0) return 0;
    return uint32_t(std::min(std::max(std::floor(probability * 0x1p32 + 0.5), 1.0), 0x1p32 - 1));
}

// A set of ids that answers "was this id seen?" fast and now and then wrongly with yes: one byte for each of many hash
// values, which holds the set's number where an id of the set hashes to it. A new number empties the set.
// (Locals in the loops: the compiler must assume that a byte store changes any member.)
class Marks {
   public:
    void clear(int64_t ids) {  // and make room for so many: 128 bytes each or more, so 1 answer in 128 is wrong
        size_t needed = 1;
        int bits = 0;
        while (needed < size_t(64 * ids)) needed *= 2, ++bits;
        if (needed > bytes_.size()) bytes_.assign(needed, 0), shift_ = 32 - bits, number_ = 0;
        if (++number_ == 0) std::fill(bytes_.begin(), bytes_.end(), 0), number_ = 1;
    }
    void add(const int32_t* ids, int64_t n) {
        uint8_t *bytes = bytes_.data(), number = number_;
        const int shift = shift_;
#pragma GCC unroll 4
        for (int64_t i = 0; i < n; ++i) bytes[slot(ids[i], shift)] = number;
    }
    bool has(int32_t id) const { return bytes_[slot(id, shift_)] == number_; }
    // Writes tag + j for each j < n with has(ids[j]), and returns how many: without a branch, which would be mispredicted.
    int64_t find(const int32_t* ids, int64_t n, int64_t tag, int64_t* found) const {
        const uint8_t *bytes = bytes_.data(), number = number_;
        const int shift = shift_;
        int64_t count = 0;
#pragma GCC unroll 4
        for (int64_t j = 0; j < n; ++j) {
            found[count] = tag + j;
            count += bytes[slot(ids[j], shift)] == number;
        }
        return count;
    }

   private:
    static size_t slot(int32_t id, int shift) { return uint64_t(uint32_t(id) * 2654435769u) >> shift; }

    std::vector<uint8_t> bytes_{0};
    uint8_t number_ = 0;
    int shift_ = 32;
};

// Binary search in ascending ids, without branches to mispredict.
bool contains(const int32_t* ids, int64_t size, int32_t id) {
    for (int64_t n = size; n > 1; n -= n / 2) ids += (ids[n / 2 - 1] < id) * (n / 2);
    return size > 0 && *ids == id;
}

struct Csr {
    const int64_t* indptr;
    int64_t rows;
    const int32_t* indices;
    int64_t size;
};

std::string row_name(const int64_t* rows, int64_t i) {
    return "rows[" + std::to_string(i) + "] = " + std::to_string(rows[i]);
}

class AliasTable {
   public:
    AliasTable(const double* p, int64_t n, Isa isa) : p_(p), n_(n), isa_(isa), entries_(allocate<Entry>(n)) { build(); }

    int64_t size() const { return n_; }
    const Entry* entries() const { return entries_.get(); }

    void sample(uint64_t seed, uint64_t offset, int64_t n, int32_t* out, int64_t threads) const {
        parallel_for((n + kBlock - 1) / kBlock, std::min(threads, n / kPerThread + 1), [&](int64_t block) {
            int64_t first = block * kBlock;
            draw(seed, offset + first, std::min(kBlock, n - first), out + first);
        });
    }

    // k draws for each of the rows, not in its history, and if `distinct` each different from the row's former draws.
    void sample_rows(const Csr& history, const int64_t* rows, int64_t n, int64_t k, bool distinct, uint64_t seed,
                     uint64_t offset, int32_t* out, int64_t threads) const {
        if (k == 0) return;
        int64_t rows_a_block = std::max<int64_t>(1, std::min<int64_t>(256, kBlock / k));
        int64_t blocks = (n + rows_a_block - 1) / rows_a_block;
        parallel_for(blocks, std::min(threads, n * k / kPerThread + 1), [&](int64_t block) {
            int64_t first = block * rows_a_block, last = std::min(n, first + rows_a_block);
            for (int64_t i = first; i < last; ++i) {
                check_row(history, rows, i);
                for (int64_t j = history.indptr[rows[i]]; j < history.indptr[rows[i] + 1]; j += 16)
                    __builtin_prefetch(history.indices + j);
            }
            draw(seed, offset + first * k, (last - first) * k, out + first * k);
            auto row_of = [&](int64_t i) {
                const int64_t begin = history.indptr[rows[i]], end = history.indptr[rows[i] + 1];
                return Row{*this,          history.indices + begin, end - begin, distinct, k, seed, offset + i * k,
                           out + i * k, rows,                    i,           {},       {}};
            };
            Marks marks;
            std::vector<int64_t> found(distinct ? 0 : (last - first) * k + 1);  // indices in out that are perhaps seen
            int64_t count = 0;
            for (int64_t i = first; i < last; ++i) {
                const int64_t begin = history.indptr[rows[i]], size = history.indptr[rows[i] + 1] - begin;
                check_ids(history.indices + begin, size, rows, i);
                marks.clear(size + (distinct ? k : 0));
                marks.add(history.indices + begin, size);
                if (!distinct) {
                    count += marks.find(out + i * k, k, i * k, &found[count]);
                    continue;
                }
                Row row = row_of(i);
                for (int64_t j = 0; j < k; ++j) {
                    if (marks.has(row.out[j]) && row.taken(row.out[j], j)) row.out[j] = row.again(j, 1);
                    marks.add(row.out + j, 1);
                }
            }
            // Attempt 1 for those found, again without branches: its column is on its way while the next one is looked at.
            std::vector<uint64_t> places(count + 1);
            int64_t rejected = 0;
            for (int64_t f = 0; f < count; ++f) {
                int64_t at = found[f], row = rows[at / k];
                places[rejected] = prepare_one(seed, offset + at, 1);
                found[rejected] = at;
                rejected += contains(history.indices + history.indptr[row], history.indptr[row + 1] - history.indptr[row], out[at]);
            }
            for (int64_t f = 0; f < rejected;) {
                Row row = row_of(found[f] / k);
                for (; f < rejected && found[f] < (row.index + 1) * k; ++f) {
                    int64_t j = found[f] - row.index * k;
                    row.out[j] = resolve(places[f]);
                    if (row.taken(row.out[j], j)) row.out[j] = row.again(j, 2);
                }
            }
        });
    }

   private:
    // Vose's table with the two work lists replaced by two sweeps over the items: one finds the next item that does not
    // fill its column (small), one the next that overflows it (large). The large item fills up the small ones until it
    // is small itself, and is then filled up by the next large one. No extra memory, and both sweeps read in order.
    void build() {
        auto scaled = [&](int64_t i) { return p_[i] * double(n_); };
        auto next = [&](int64_t i, bool large) {
            while (i < n_ && (scaled(i) >= 1) != large) ++i;
            return i;
        };
        int32_t heaviest = int32_t(std::max_element(p_, p_ + n_) - p_);
        int64_t small = next(0, false), large = next(0, true);
        double rest = large < n_ ? scaled(large) : 0;
        while (large < n_) {
            if (rest < 1) {
                int64_t filler = next(large + 1, true);
                if (filler == n_) break;
                entries_[large] = {quantise(rest), int32_t(filler)};
                rest = (rest + scaled(filler)) - 1;
                large = filler;
            } else if (small < n_) {
                entries_[small] = {quantise(scaled(small)), int32_t(large)};
                rest -= 1 - scaled(small);
                small = next(small + 1, false);
            } else {
                break;
            }
        }
        // What is left fills its column but for rounding.
        for (; large < n_; large = next(large + 1, true)) entries_[large] = {~0u, int32_t(large)};
        for (; small < n_; small = next(small + 1, false))
            entries_[small] = p_[small] > 0 ? Entry{~0u, int32_t(small)} : Entry{0, heaviest};
    }

    // floor(x * V / 2^32): the column in the high half, the height in it in the low half.
    uint64_t place(uint64_t x) const { return (x >> 32) * uint64_t(n_) + ((x & 0xFFFFFFFF) * uint64_t(n_) >> 32); }

    int32_t resolve(uint64_t place) const {
        Entry entry = entries_[place >> 32];
        int32_t own = -int32_t(uint32_t(place) < entry.threshold);  // all ones or zero: a branch would be mispredicted
        return entry.alias ^ ((entry.alias ^ int32_t(place >> 32)) & own);
    }

    uint64_t prepare_one(uint64_t seed, uint64_t position, uint32_t attempt) const {
        uint64_t at = place(philox(seed, position, attempt, kSamplerStream).bits());
        __builtin_prefetch(&entries_[at >> 32]);
        return at;
    }

    void prepare(uint64_t seed, uint64_t position, int64_t n, uint64_t* places) const {
        philox_bits(isa_, seed, position, 0, kSamplerStream, int(n + 7) / 8 * 8, places);
        for (int64_t i = 0; i < n; ++i) {
            places[i] = place(places[i]);
            __builtin_prefetch(&entries_[places[i] >> 32]);
        }
    }

    void draw(uint64_t seed, uint64_t position, int64_t n, int32_t* out) const {
        alignas(64) std::array<std::array<uint64_t, kChunk>, 2> places;
        prepare(seed, position, std::min<int64_t>(kChunk, n), places[0].data());
        for (int64_t first = 0, turn = 0; first < n; first += kChunk, turn ^= 1) {
            int64_t next = first + kChunk;
            if (next < n) prepare(seed, position + next, std::min<int64_t>(kChunk, n - next), places[turn ^ 1].data());
            for (int64_t i = first; i < std::min(next, n); ++i) out[i] = resolve(places[turn][i - first]);
        }
    }

    // One row's k draws. Attempts 0 ... 255 at a position read the table. If all are rejected the row gets an exact list
    // of what is left, with cumulative weights, and attempts 256 ... 511 search that; in the distinct mode what is drawn
    // later makes the list stale, and if that rejects them all too, attempt 512 searches a new list, which cannot fail.
    struct Row {
        const AliasTable& table;
        const int32_t* history;  // ascending
        int64_t size;
        bool distinct;
        int64_t k;
        uint64_t seed, position;
        int32_t* out;
        const int64_t* rows;
        int64_t index;
        std::vector<int32_t> left;
        std::vector<double> cumulative;

        bool taken(int32_t id, int64_t j) const {
            return contains(history, size, id) || (distinct && std::find(out, out + j, id) != out + j);
        }

        int32_t again(int64_t j, uint32_t attempt) {
            for (; attempt < kAttempts; ++attempt) {
                int32_t id = table.resolve(table.prepare_one(seed, position + j, attempt));
                if (!taken(id, j)) return id;
            }
            if (left.empty()) list(j);
            for (; attempt < 2 * kAttempts; ++attempt) {
                int32_t id = search(j, attempt);
                if (!taken(id, j)) return id;
            }
            list(j);
            return search(j, attempt);
        }

        void list(int64_t j) {  // the items that the row may still draw, and their cumulative weights
            std::vector<int32_t> out_of_play(history, history + size);
            if (distinct) out_of_play.insert(out_of_play.end(), out, out + j);
            std::sort(out_of_play.begin(), out_of_play.end());
            left.clear(), cumulative.clear();
            double sum = 0;
            auto skip = out_of_play.begin();
            for (int64_t id = 0; id < table.n_; ++id) {
                while (skip != out_of_play.end() && *skip < id) ++skip;
                if (table.p_[id] == 0 || (skip != out_of_play.end() && *skip == id)) continue;
                left.push_back(int32_t(id));
                cumulative.push_back(sum += table.p_[id]);
            }
            if (!left.empty()) return;
            throw std::invalid_argument(
                distinct ? row_name(rows, index) + ": only " + std::to_string(j) + " items of positive weight are outside its history, but " +
                               std::to_string(k) + " distinct ones were asked for; lower k or leave the row out"
                         : row_name(rows, index) + ": its history holds every item of positive weight, nothing is left to draw; "
                                  "leave the row out");
        }

        int32_t search(int64_t j, uint32_t attempt) const {
            double u = double(philox(seed, position + j, attempt, kSamplerStream).bits() >> 11) * 0x1p-53;
            auto at = std::upper_bound(cumulative.begin(), cumulative.end(), u * cumulative.back()) - cumulative.begin();
            return left[std::min<size_t>(at, left.size() - 1)];
        }
    };

    static void check_row(const Csr& history, const int64_t* rows, int64_t i) {
        bool known = rows[i] >= 0 && rows[i] < history.rows;
        int64_t begin = known ? history.indptr[rows[i]] : 0, end = known ? history.indptr[rows[i] + 1] : 0;
        if (known && 0 <= begin && begin <= end && end <= history.size) return;
        if (!known)
            throw std::invalid_argument(row_name(rows, i) + " is out of range: indptr has " + std::to_string(history.rows) + " rows");
        throw std::invalid_argument(row_name(rows, i) + ": indptr goes from " + std::to_string(begin) + " to " +
                                    std::to_string(end) + ", but must ascend within 0 ... len(indices) = " +
                                    std::to_string(history.size));
    }

    void check_ids(const int32_t* ids, int64_t size, const int64_t* rows, int64_t i) const {
        int descents = 0;
        for (int64_t j = 0; j + 1 < size; ++j) descents |= ids[j] > ids[j + 1];
        bool sorted = !descents;
        if (sorted && (size == 0 || (ids[0] >= 0 && ids[size - 1] < n_))) return;
        throw std::invalid_argument(row_name(rows, i) + ": its history " +
                                    (sorted ? "holds ids outside 0 ... " + std::to_string(n_ - 1) + ", the sampler's items"
                                            : "is not sorted; sort each row of indices once"));
    }

    const double* p_;
    int64_t n_;
    Isa isa_;
    std::unique_ptr<Entry[], void (*)(void*)> entries_;
};

// What follows checks the arguments. It is done here and not in Python because it costs more there than 1,000 draws.

std::string describe(const py::handle& value) { return py::str(value); }

uint64_t integer(const py::handle& value, const char* name, uint64_t high) {  // in 0 ... high
    auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!index) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + " must be an integer, got " + Py_TYPE(value.ptr())->tp_name);
    }
    unsigned long long number = PyLong_AsUnsignedLongLong(index.ptr());
    bool overflow = PyErr_Occurred() != nullptr;  // negative, or 2^64 and more
    if (overflow) PyErr_Clear();
    if (overflow || number > high)
        throw std::invalid_argument(std::string(name) + " must be in 0 ... " + std::to_string(high) + ", got " +
                                    describe(index));
    return number;
}

template <class T>
py::array_t<T> array(const py::handle& value, const char* name) {
    if (!py::isinstance<py::array>(value))
        throw py::type_error(std::string(name) + " must be a numpy array, got " + Py_TYPE(value.ptr())->tp_name +
                             "; for a CPU tensor t pass t.numpy()");
    auto a = py::reinterpret_borrow<py::array>(value);
    if (!py::isinstance<py::array_t<T>>(a)) {
        std::string wanted = describe(py::dtype::of<T>());
        throw py::type_error(std::string(name) + " must be " + wanted + ", got " + describe(a.dtype()) +
                             "; convert it once with .astype(numpy." + wanted + ")");
    }
    if (!(a.flags() & py::array::c_style) || !is_aligned(a))
        throw std::invalid_argument(std::string(name) +
                                    " must be C-contiguous and aligned; make it so once with numpy.ascontiguousarray");
    return py::reinterpret_borrow<py::array_t<T>>(a);
}

template <class T>
py::array_t<T> vector(const py::handle& value, const char* name) {
    auto a = array<T>(value, name);
    if (a.ndim() != 1)
        throw std::invalid_argument(std::string(name) + " must be 1-D, got shape " + describe(a.attr("shape")));
    return a;
}

int32_t* output(py::array_t<int32_t>& out) {
    if (!out.writeable()) throw std::invalid_argument("out must be writable, got a read-only array");
    return out.mutable_data();
}

constexpr uint64_t kPositions = uint64_t(1) << 63;
constexpr uint64_t kMaxSeed = std::numeric_limits<uint64_t>::max();

AliasTable make_table(const py::handle& probabilities, const std::string& isa) {
    auto p = vector<double>(probabilities, "probabilities");
    if (p.size() < 1 || p.size() > int64_t(1) << 31)
        throw std::invalid_argument("there must be 1 ... 2^31 items, got " + std::to_string(p.size()));
    double sum = 0;
    for (int64_t i = 0; i < p.size(); ++i) {
        if (!(p.data()[i] >= 0 && p.data()[i] <= 1)) throw std::invalid_argument("probabilities must be in 0 ... 1");
        sum += p.data()[i];
    }
    if (!(std::abs(sum - 1) < 1e-6)) throw std::invalid_argument("probabilities must sum to 1");
    py::gil_scoped_release release;
    return AliasTable(p.data(), p.size(), choose_isa(isa));
}

void sample(const AliasTable& table, py::handle seed, py::handle offset, py::handle out, int64_t threads) {
    auto drawn = array<int32_t>(out, "out");
    int32_t* ids = output(drawn);
    int64_t n = drawn.size();
    uint64_t key = integer(seed, "seed", kMaxSeed), first = integer(offset, "offset", kPositions - n);
    py::gil_scoped_release release;
    table.sample(key, first, n, ids, threads);
}

void sample_rows(const AliasTable& table, py::handle indptr, py::handle indices, py::handle rows, bool distinct,
                 py::handle seed, py::handle offset, py::handle out, int64_t threads) {
    auto starts = vector<int64_t>(indptr, "indptr");
    auto ids = vector<int32_t>(indices, "indices");
    auto which = vector<int64_t>(rows, "rows");
    auto drawn = array<int32_t>(out, "out");
    if (drawn.ndim() != 2 || drawn.shape(0) != which.size())
        throw std::invalid_argument("out must have a row for each of the " + std::to_string(which.size()) +
                                    " rows, got shape " + describe(drawn.attr("shape")));
    if (starts.size() < 1 || starts.data()[0] != 0 || starts.data()[starts.size() - 1] != ids.size())
        throw std::invalid_argument("indptr must go from 0 to len(indices) = " + std::to_string(ids.size()) +
                                    (starts.size() < 1 ? ", got an empty array"
                                                       : ", got " + std::to_string(starts.data()[0]) + " to " +
                                                             std::to_string(starts.data()[starts.size() - 1])));
    expect_apart(drawn, "indptr", starts);
    expect_apart(drawn, "indices", ids);
    expect_apart(drawn, "rows", which);
    int32_t* result = output(drawn);
    uint64_t key = integer(seed, "seed", kMaxSeed), first = integer(offset, "offset", kPositions - drawn.size());
    Csr history{starts.data(), starts.size() - 1, ids.data(), ids.size()};
    const int64_t *row = which.data(), n = which.size(), k = drawn.shape(1);
    py::gil_scoped_release release;
    table.sample_rows(history, row, n, k, distinct, key, first, result, threads);
}

}  // namespace

void register_sampler(py::module_& m) {
    py::class_<AliasTable>(m, "AliasTable", "The alias table of a law p; see cafe_kernels.AliasSampler.")
        .def(py::init(&make_table), py::arg("probabilities"), py::arg("isa") = "auto", py::keep_alive<1, 2>())
        .def("sample", &sample, py::arg("seed"), py::arg("offset"), py::arg("out"), py::arg("threads"))
        .def("sample_rows", &sample_rows, py::arg("indptr"), py::arg("indices"), py::arg("rows"),
             py::arg("distinct"), py::arg("seed"), py::arg("offset"), py::arg("out"), py::arg("threads"))
        .def_property_readonly(
            "entries",
            [](py::object self) {
                auto& table = self.cast<const AliasTable&>();
                auto words = reinterpret_cast<const uint32_t*>(table.entries());
                py::array_t<uint32_t> view({table.size(), int64_t(2)}, words, self);
                view.attr("flags").attr("writeable") = false;
                return view;
            },
            "(V, 2) uint32, read-only: each column's threshold (times 2^-32) and alias.");
    m.def(
        "philox",
        [](uint64_t seed, uint64_t position, uint32_t attempt, uint32_t stream) {
            Philox block = philox(seed, position, attempt, stream);
            return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
        },
        py::arg("seed"), py::arg("position"), py::arg("attempt") = 0, py::arg("stream") = 0,
        "The four words of one Philox4x32-10 block.");
    m.def(
        "philox_bits",
        [](uint64_t seed, uint64_t position, uint32_t attempt, uint32_t stream, int blocks_of_8, const std::string& isa) {
            if (blocks_of_8 < 0 || blocks_of_8 >= 1 << 28) throw std::invalid_argument("blocks_of_8 must be in 0 ... 2^28 - 1");
            py::array_t<uint64_t> bits(blocks_of_8 * 8);
            philox_bits(choose_isa(isa), seed, position, attempt, stream, int(bits.size()), bits.mutable_data());
            return bits;
        },
        py::arg("seed"), py::arg("position"), py::arg("attempt"), py::arg("stream"), py::arg("blocks_of_8"),
        py::arg("isa") = "auto", "word 0 + 2^32 word 1 of consecutive positions, by the code path `isa`.");
}

}  // namespace cafe

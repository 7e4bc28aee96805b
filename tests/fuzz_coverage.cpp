// Counts how often each place of csrc/ is reached, where it is compiled with -fsanitize-coverage=trace-pc, for libFuzzer
// (tests/fuzz.py): GCC calls __sanitizer_cov_trace_pc in every basic block, libFuzzer reads counters, which Clang would make.
#include <cstddef>
#include <cstdint>

namespace {
constexpr size_t kPlaces = 1 << 16;
uint8_t counters[kPlaces];
uintptr_t places[2 * kPlaces];  // an address and flags for each, which libFuzzer wants to exist
}  // namespace

extern "C" {
__attribute__((visibility("hidden"))) void __sanitizer_cov_trace_pc() {
    const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
    uint8_t& count = counters[uint64_t(place) * 0x9E3779B97F4A7C15u >> 48];
    count += count < 255;
}
uint8_t* cafe_counters() { return counters; }
uintptr_t* cafe_places() { return places; }
size_t cafe_size() { return kPlaces; }
}

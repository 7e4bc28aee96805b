// Which vector instructions to use, decided at run time so that one build serves every CPU.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define CAFE_X86 1
#endif

namespace cafe {

struct Bf16 {  // bfloat16, which numpy knows by its bits only
    uint16_t bits;
};

enum class Isa { portable, avx2, avx512 };

inline bool has(Isa isa) {
#ifdef CAFE_X86
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx512) return __builtin_cpu_supports("avx512f");
#endif
    return isa == Isa::portable;
}

// "auto" is the widest that this CPU has; the others force one.
inline Isa choose_isa(const std::string& name) {
    if (name == "auto") return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::portable;
    Isa isa = Isa::portable;
    if (name == "avx512") isa = Isa::avx512;
    else if (name == "avx2") isa = Isa::avx2;
    else if (name != "portable")
        throw std::invalid_argument("unknown instruction set '" + name + "': expected auto, portable, avx2 or avx512");
    if (!has(isa)) throw std::invalid_argument("this CPU has no " + name + ": set auto or portable");
    return isa;
}

}  // namespace cafe

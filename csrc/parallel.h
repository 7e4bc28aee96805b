// parallel_for: runs f(0), ..., f(blocks - 1). The caller cuts the work into blocks without looking at the number of
// threads, so the result cannot depend on it. Threads live for one call: a pool would not survive a fork (PyTorch's
// DataLoader forks), and starting one costs some 30 us, so small calls should pass threads = 1, which starts none.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace cafe {

// Of several exceptions the one of the lowest block is rethrown. Blocks are started in ascending order and those that
// were started are finished, so which one that is does not depend on the number of threads either.
template <class F>
void parallel_for(int64_t blocks, int64_t threads, const F& f) {
    threads = std::min(threads, blocks);
    if (threads <= 1) {
        for (int64_t block = 0; block < blocks; ++block) f(block);
        return;
    }
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::exception_ptr error;
    int64_t error_block = blocks;
    auto work = [&] {
        while (!failed) {
            int64_t block = next++;
            if (block >= blocks) return;
            try {
                f(block);
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex);
                failed = true;
                if (block < error_block) error_block = block, error = std::current_exception();
            }
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    try {
        while (int64_t(helpers.size()) < threads - 1) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // the system grants no more threads: those we have do the work
    }
    work();
    for (auto& helper : helpers) helper.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace cafe

// Packs documents into sequences by best fit, then spreads them evenly; see packing.h.

#include "packing.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <set>
#include <tuple>
#include <utility>

namespace lmf {
namespace {

using Sequences = std::vector<std::vector<int64_t>>;

// Puts each document of `order`, the longest first, into the fullest sequence that still takes it.
Sequences best_fit(const int64_t* length, const std::vector<int64_t>& order, int64_t capacity) {
  Sequences sequences;
  // (free tokens, sequence): the first that is large enough is the best fit.
  std::set<std::pair<int64_t, size_t>> free_space;
  for (const int64_t document : order) {
    auto best = free_space.lower_bound({length[document], 0});
    int64_t free = capacity;
    size_t sequence = sequences.size();
    if (best == free_space.end()) {
      sequences.emplace_back();
    } else {
      std::tie(free, sequence) = *best;
      free_space.erase(best);
    }
    sequences[sequence].push_back(document);
    free_space.emplace(free - length[document], sequence);
  }
  return sequences;
}

// Puts each document of `order`, the longest first, into the emptiest of `count` sequences. Returns none if one does
// not fit there.
Sequences spread(const int64_t* length, const std::vector<int64_t>& order, int64_t capacity, size_t count) {
  using Used = std::pair<int64_t, size_t>;  // (tokens, sequence)
  std::priority_queue<Used, std::vector<Used>, std::greater<Used>> emptiest;
  for (size_t sequence = 0; sequence < count; ++sequence) emptiest.emplace(0, sequence);
  Sequences sequences(count);
  for (const int64_t document : order) {
    const auto [used, sequence] = emptiest.top();
    if (used + length[document] > capacity) return {};
    emptiest.pop();
    emptiest.emplace(used + length[document], sequence);
    sequences[sequence].push_back(document);
  }
  return sequences;
}

}  // namespace

Sequences pack(const int64_t* length, int64_t num_documents, int64_t capacity, int64_t window) {
  Sequences packed;
  for (int64_t begin = 0; begin < num_documents; begin += std::min(window, num_documents - begin)) {
    std::vector<int64_t> order(std::min(window, num_documents - begin));
    std::iota(order.begin(), order.end(), begin);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });

    Sequences sequences = best_fit(length, order, capacity);
    if (Sequences even = spread(length, order, capacity, sequences.size()); !even.empty()) sequences = std::move(even);
    for (auto& sequence : sequences) std::sort(sequence.begin(), sequence.end());
    std::sort(sequences.begin(), sequences.end());
    packed.insert(packed.end(), sequences.begin(), sequences.end());
  }
  return packed;
}

}  // namespace lmf

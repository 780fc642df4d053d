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

using Rows = std::vector<std::vector<int64_t>>;

// Each document of `order`, the longest first, into the fullest row that still takes it.
Rows best_fit(const int64_t* length, const std::vector<int64_t>& order, int64_t capacity) {
  Rows rows;
  std::set<std::pair<int64_t, size_t>> room;  // (free tokens, row): the first that is large enough is the best fit
  for (const int64_t document : order) {
    auto best = room.lower_bound({length[document], 0});
    int64_t free = capacity;
    size_t row = rows.size();
    if (best == room.end()) {
      rows.emplace_back();
    } else {
      std::tie(free, row) = *best;
      room.erase(best);
    }
    rows[row].push_back(document);
    room.emplace(free - length[document], row);
  }
  return rows;
}

// Each document of `order`, the longest first, into the emptiest of `num_rows` rows; none where one does not fit there.
Rows deal(const int64_t* length, const std::vector<int64_t>& order, int64_t capacity, size_t num_rows) {
  using Used = std::pair<int64_t, size_t>;  // (tokens, row)
  std::priority_queue<Used, std::vector<Used>, std::greater<Used>> emptiest;
  for (size_t row = 0; row < num_rows; ++row) emptiest.emplace(0, row);
  Rows rows(num_rows);
  for (const int64_t document : order) {
    const auto [used, row] = emptiest.top();
    if (used + length[document] > capacity) return {};
    emptiest.pop();
    emptiest.emplace(used + length[document], row);
    rows[row].push_back(document);
  }
  return rows;
}

}  // namespace

Rows pack(const int64_t* length, int64_t num_documents, int64_t capacity, int64_t window) {
  Rows packed;
  for (int64_t begin = 0; begin < num_documents; begin += std::min(window, num_documents - begin)) {
    std::vector<int64_t> order(std::min(window, num_documents - begin));
    std::iota(order.begin(), order.end(), begin);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });

    Rows rows = best_fit(length, order, capacity);
    if (Rows even = deal(length, order, capacity, rows.size()); !even.empty()) rows = std::move(even);
    for (auto& row : rows) std::sort(row.begin(), row.end());
    std::sort(rows.begin(), rows.end());
    packed.insert(packed.end(), rows.begin(), rows.end());
  }
  return packed;
}

}  // namespace lmf

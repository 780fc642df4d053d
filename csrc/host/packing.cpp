#include "packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

namespace lmf {

std::vector<std::vector<int64_t>> pack(const int64_t* length, int64_t num_documents, int64_t capacity, int64_t window) {
  std::vector<std::vector<int64_t>> packed;
  for (int64_t begin = 0; begin < num_documents; begin += std::min(window, num_documents - begin)) {
    std::vector<int64_t> order(std::min(window, num_documents - begin));
    std::iota(order.begin(), order.end(), begin);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });

    std::vector<std::vector<int64_t>> rows;
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
    for (auto& row : rows) std::sort(row.begin(), row.end());
    std::sort(rows.begin(), rows.end());
    packed.insert(packed.end(), rows.begin(), rows.end());
  }
  return packed;
}

}  // namespace lmf

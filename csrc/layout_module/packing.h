// Which documents share a row of fixed capacity?

#pragma once

#include <cstdint>
#include <vector>

namespace lmf {

// Inside each window of `window` consecutive documents, the longest first: into as few rows as best fit needs, each
// document into the emptiest, where that works, else by best fit. Ties go to the lower document and the lower row, so the
// answer is a function of its input. Rows come in the order of their first document, their documents ascending. Every
// length is in 1..capacity.
std::vector<std::vector<int64_t>> pack(const int64_t* length, int64_t num_documents, int64_t capacity, int64_t window);

}  // namespace lmf

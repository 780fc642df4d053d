// Which documents share a row of fixed capacity?

#pragma once

#include <cstdint>
#include <vector>

namespace lmf {

// Best-fit decreasing inside each window of `window` consecutive documents: the longest document first, into the fullest
// row that still takes it. Ties go to the lower document and the older row, so the answer is a function of its input.
// Rows come in the order of their first document, their documents ascending. Every length is in 1..capacity.
std::vector<std::vector<int64_t>> pack(const int64_t* length, int64_t num_documents, int64_t capacity, int64_t window);

}  // namespace lmf

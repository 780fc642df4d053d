// Packs documents into sequences of fixed capacity.

#pragma once

#include <cstdint>
#include <vector>

namespace lmf {

// Works on each window of `window` consecutive documents, the longest first, with as few sequences as best fit needs.
// Each document goes into the emptiest sequence if all fit in that way, else by best fit. Ties go to the lower document
// and the lower sequence, so the result depends only on the input. Returns the documents of each sequence, ascending,
// with the sequences in the order of their first document. Every length must be in 1..capacity.
std::vector<std::vector<int64_t>> pack(const int64_t* length, int64_t num_documents, int64_t capacity, int64_t window);

}  // namespace lmf

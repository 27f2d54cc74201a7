// Validity of index tensors. Kernels trust nothing: whatever would make one read or write out of
// bounds is found here first. Each function returns an empty string, or the broken rule with the
// values seen.
#pragma once

#include <cstdint>
#include <string>

#include "core/view.h"

namespace tetris {

// row_ptr starts at 0, never decreases, ends at nnzb.
std::string check_row_ptr(const BlockSparseView& w);

// Column groups of block rows [begin, end) lie in [0, col_groups()) and ascend strictly in a row.
// Needs a valid row_ptr.
std::string check_col_idx(const BlockSparseView& w, int64_t begin, int64_t end);

// Same rule, as a fast yes/no for one block row's indices.
bool ascending_in_range(const int32_t* idx, int64_t count, int64_t limit);

// perm holds each of 0 .. n-1 once. inverse[n] receives its inverse.
std::string check_permutation(const char* name, const int32_t* perm, int64_t n, int32_t* inverse);

// The same for the channels of several groups, each of which stays in its group.
std::string check_permutation(const char* name, const int32_t* perm, int64_t n, int64_t groups,
                              int32_t* inverse);

// All of the above, once, for a view whose arrays are in the host's memory.
std::string check_index(const BlockSparseView& w);

}  // namespace tetris

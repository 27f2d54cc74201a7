// Chooses the instruction set, once, from a best-first table.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace tetris::cpu {

// The table in use. Throws std::runtime_error where TETRIS_CPU_ISA (or force_isa) names an
// instruction set that is unknown, not built, or not supported by this CPU.
template <class T>
const KernelTable<T>& kernels();

// Overrides TETRIS_CPU_ISA for this process; an empty name returns to the environment's choice.
void force_isa(const std::string& name);

std::string isa_in_use();
std::vector<std::string> isas_built();      // best first
std::vector<std::string> isas_supported();  // of those, what this CPU runs

// Name of the kernel that the calling thread's last op ran, "" before the first: how tests prove
// which path was taken.
void set_last_kernel(const char* name);
const char* last_kernel();

}  // namespace tetris::cpu

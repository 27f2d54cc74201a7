# ISA-specific files get their own flags and are entered only through the run-time table
# (csrc/cpu/dispatch.cpp). A compiler or platform without an ISA drops the file and the table row.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

set(TETRIS_ISA_FLAGS_avx2 -mavx2 -mfma)
set(TETRIS_ISA_FLAGS_avx512 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma
    -mprefer-vector-width=512)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND TETRIS_ISA_FLAGS_avx512 -Wno-maybe-uninitialized)  # GCC 12 warns inside its own intrinsics
endif()
# Where general registers run out, values belong on the stack: in a vector register, which GCC
# prefers, they come back only after the FMAs that are queued there.
set(TETRIS_SPILL_TO_STACK -mtune-ctrl=^inter_unit_moves_from_vec,^inter_unit_moves_to_vec)
check_cxx_compiler_flag(${TETRIS_SPILL_TO_STACK} TETRIS_HAVE_SPILL_TO_STACK)
if(TETRIS_HAVE_SPILL_TO_STACK)
  list(APPEND TETRIS_ISA_FLAGS_avx2 ${TETRIS_SPILL_TO_STACK})
  list(APPEND TETRIS_ISA_FLAGS_avx512 ${TETRIS_SPILL_TO_STACK})
endif()
set(TETRIS_ISAS "scalar" CACHE INTERNAL "")

function(tetris_add_isa target isa source)
  set(flags ${TETRIS_ISA_FLAGS_${isa}})
  string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${flags}")
  check_cxx_source_compiles("#include <immintrin.h>
    int main() { return sizeof(__m256) == 32 ? 0 : 1; }" TETRIS_HAVE_${isa})
  if(TETRIS_HAVE_${isa})
    target_sources(${target} PRIVATE ${source})
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${flags}")
    string(TOUPPER ${isa} upper)
    target_compile_definitions(${target} PRIVATE TETRIS_WITH_${upper})
    set(TETRIS_ISAS "${isa};${TETRIS_ISAS}" CACHE INTERNAL "")
  endif()
endfunction()

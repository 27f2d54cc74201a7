# The torch extension. Include and library folders come from torch.utils.cpp_extension:
# find_package(Torch) would drag in the whole CUDA toolkit, of which nothing here is needed.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

execute_process(
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/torch_config.py
  OUTPUT_VARIABLE torch_config RESULT_VARIABLE torch_failed OUTPUT_STRIP_TRAILING_WHITESPACE)
if(torch_failed)
  message(FATAL_ERROR "tetris builds against an installed torch (>= 2.6) and needs pybind11: install both "
                      "into ${Python_EXECUTABLE}'s environment, then pip install --no-build-isolation .")
endif()
list(GET torch_config 0 TORCH_VERSION)
list(GET torch_config 1 TORCH_CUDA_VERSION)
list(GET torch_config 2 TORCH_CXX11_ABI)
list(GET torch_config 3 torch_lib_dir)
list(GET torch_config 4 pybind11_include)
list(GET torch_config 5 torch_openmp)
list(SUBLIST torch_config 6 -1 torch_includes)
tetris_cuda_for_torch()

Python_add_library(_C MODULE WITH_SOABI
  csrc/bindings.cpp
  csrc/bindings_reorder.cpp
  csrc/ops/library.cpp
  csrc/ops/parallel.cpp
  csrc/ops/output.cpp
  csrc/ops/bsmm_checks.cpp
  csrc/ops/bsmm_cpu.cpp
  csrc/ops/autograd.cpp
  csrc/ops/bsmm_autograd.cpp
  csrc/ops/conv_checks.cpp
  csrc/ops/conv_cpu.cpp
  csrc/ops/conv_autograd.cpp)
tetris_target(_C)
# at::parallel_for runs on OpenMP. Where torch brings GCC's runtime and GCC compiles, the calls resolve to
# that: one pool of threads. Elsewhere a runtime is linked, whose threads are as many as torch's, but others.
set(TETRIS_THREADS "torch's own")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND torch_openmp STREQUAL "gomp")
  set_source_files_properties(csrc/ops/parallel.cpp PROPERTIES COMPILE_OPTIONS -fopenmp)
else()
  find_package(OpenMP COMPONENTS CXX)
  if(OpenMP_CXX_FOUND)
    separate_arguments(openmp_flags NATIVE_COMMAND "${OpenMP_CXX_FLAGS}")
    set_source_files_properties(csrc/ops/parallel.cpp PROPERTIES COMPILE_OPTIONS "${openmp_flags}")
    target_link_libraries(_C PRIVATE ${OpenMP_CXX_LIBRARIES})
    set(TETRIS_THREADS "another pool beside torch's (${OpenMP_CXX_FLAGS})")
  else()
    set(TETRIS_THREADS "one: this compiler has no OpenMP")
    message(WARNING "no OpenMP: kernels will run on one thread")
  endif()
endif()
# torch's headers ask for C++20 from some release on (2.15 does, 2.13 does not).
if(TORCH_VERSION VERSION_GREATER_EQUAL 2.14)
  set_target_properties(_C PROPERTIES CXX_STANDARD 20)
endif()
target_include_directories(_C SYSTEM PRIVATE ${torch_includes} ${pybind11_include})
target_compile_definitions(_C PRIVATE _GLIBCXX_USE_CXX11_ABI=${TORCH_CXX11_ABI}
                                      TETRIS_VERSION="${TETRIS_VERSION}")
set(target_names "")
if(TETRIS_CUDA_BUILT)
  target_sources(_C PRIVATE
    csrc/bindings_cuda.cpp
    csrc/ops/cuda_device.cpp
    csrc/ops/cuda_layout.cpp
    csrc/ops/cuda_run.cpp
    csrc/ops/bsmm_cuda.cpp
    csrc/ops/conv_cuda.cpp)
  foreach(target IN LISTS TETRIS_CUDA_TARGETS)
    list(APPEND target_names sm_${target})
    if(target STREQUAL "90")
      list(APPEND target_names sm_90a)
    endif()
  endforeach()
  list(APPEND target_names compute_80)
  target_include_directories(_C SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_link_libraries(_C PRIVATE tetris_cuda torch_cuda c10_cuda)
  # The runtime that torch has loaded, not a second one beside it.
  set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Shared LINKER_LANGUAGE CXX)
else()
  target_sources(_C PRIVATE csrc/bindings_no_cuda.cpp csrc/ops/no_cuda.cpp)
endif()
list(JOIN target_names "," target_names)
target_compile_definitions(_C PRIVATE TETRIS_CUDA_KEY=CUDA TETRIS_CUDA_WHY="${TETRIS_CUDA_WHY}"
                                      TETRIS_CUDA_TARGETS="${target_names}")
target_link_directories(_C PRIVATE ${torch_lib_dir})
target_link_libraries(_C PRIVATE tetris_cpu tetris_reorder torch torch_cpu c10)
# torch is imported before _C, so its libraries are already loaded; no path of the build machine is kept.
set_target_properties(_C PROPERTIES SKIP_BUILD_RPATH ON)
install(TARGETS _C LIBRARY DESTINATION tetris)

# The ops of CUDA over the emulator and CPU tensors, beside the real module: tests/emulated_ops/README.md.
if(TETRIS_EMULATED_OPS)
  add_subdirectory(tests/emulated_ops)
endif()

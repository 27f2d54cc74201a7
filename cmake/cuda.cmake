# The CUDA kernels: which files, for which GPUs, and whether this build has them.
#
#   TETRIS_CUDA_BUILT   the extension has CUDA kernels
#   TETRIS_CUDA_WHY     why, or why not: for the summary and for messages
#   tetris_cuda         the kernels and what chooses among them, without torch
#   cuda_objects        target: compiles the kernels alone, wherever nvcc is, so that they cannot rot
#
# Needed are nvcc and the CUDA runtime: no cuBLAS, no cuDNN, no driver.
set(TETRIS_CUDA "AUTO" CACHE STRING "CUDA kernels: 1, 0, or AUTO: where torch has CUDA and nvcc is found")
# Machine code per GPU generation, all from one compilation to PTX (compute_80), which is kept for newer
# ones: those compile it when a kernel is first used, which takes them seconds. 90 brings hopper's
# kernels, too, whose instructions are of sm_90a alone.
set(TETRIS_CUDA_TARGETS "80;90" CACHE STRING "GPUs to compile for, such as 80;86;89;90")
# Every file of kernels, and the host code that chooses among them. Hopper's are sm_90a's.
file(GLOB TETRIS_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
file(GLOB TETRIS_CUDA_HOST_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cpp)
set(TETRIS_CUDA_SM90_SOURCES ${TETRIS_CUDA_SOURCES})
list(FILTER TETRIS_CUDA_SM90_SOURCES INCLUDE REGEX "/hopper[^/]*$")
list(FILTER TETRIS_CUDA_SOURCES EXCLUDE REGEX "/hopper[^/]*$")
if("90" IN_LIST TETRIS_CUDA_TARGETS)
  list(FILTER TETRIS_CUDA_HOST_SOURCES EXCLUDE REGEX "/no_hopper[.]cpp$")
endif()

# TETRIS_NVCC_WHY: empty where CUDA is a language of this project from here on.
macro(tetris_find_nvcc)
  find_program(TETRIS_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
  set(TETRIS_NVCC_WHY "")
  if(NOT TETRIS_NVCC)
    set(TETRIS_NVCC_WHY "nvcc was not found: not on PATH, nor in CUDA_HOME/bin, nor in /usr/local/cuda/bin")
  else()
    if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
      set(CMAKE_CUDA_COMPILER ${TETRIS_NVCC})
    endif()
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      enable_language(CUDA)
      set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
    else()
      set(TETRIS_NVCC_WHY "${TETRIS_NVCC} cannot compile here")
    endif()
  endif()
endmacro()

# Targets as flags of each file: the same for all but sm_90a's.
function(tetris_cuda_library name type)
  set(code "")
  set(sources ${TETRIS_CUDA_SOURCES})
  foreach(target IN LISTS TETRIS_CUDA_TARGETS)
    list(APPEND code sm_${target})
  endforeach()
  list(JOIN code "," code)
  set_source_files_properties(${sources} PROPERTIES
    COMPILE_OPTIONS "-gencode=arch=compute_80,code=[${code},compute_80]")
  if("90" IN_LIST TETRIS_CUDA_TARGETS)
    list(APPEND sources ${TETRIS_CUDA_SM90_SOURCES})
    set_source_files_properties(${TETRIS_CUDA_SM90_SOURCES} PROPERTIES
      COMPILE_OPTIONS "-gencode=arch=compute_90a,code=sm_90a")
  endif()
  add_library(${name} ${type} ${sources} ${ARGN})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>)
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES OFF CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Shared)
endfunction()

function(tetris_cuda_objects)
  tetris_cuda_library(cuda_objects OBJECT)
  set_target_properties(cuda_objects PROPERTIES EXCLUDE_FROM_ALL ON)
endfunction()

# For the extension; needs TORCH_CUDA_VERSION.
macro(tetris_cuda_for_torch)
  set(TETRIS_CUDA_BUILT OFF)
  if(TETRIS_CUDA STREQUAL "0")
    set(TETRIS_CUDA_WHY "built with TETRIS_CUDA=0")
  else()
    tetris_find_nvcc()
    if(TORCH_CUDA_VERSION STREQUAL "none")
      set(TETRIS_CUDA_WHY "built against a torch without CUDA, ${TORCH_VERSION}")
    elseif(TETRIS_NVCC_WHY)
      set(TETRIS_CUDA_WHY "${TETRIS_NVCC_WHY}")
    else()
      string(REGEX MATCH "^[0-9]+" torch_major ${TORCH_CUDA_VERSION})
      string(REGEX MATCH "^[0-9]+" nvcc_major ${CMAKE_CUDA_COMPILER_VERSION})
      if(torch_major EQUAL nvcc_major)
        set(TETRIS_CUDA_BUILT ON)
        set(TETRIS_CUDA_WHY "torch has CUDA ${TORCH_CUDA_VERSION}, nvcc is ${CMAKE_CUDA_COMPILER_VERSION}")
      else()
        set(TETRIS_CUDA_WHY "torch has CUDA ${TORCH_CUDA_VERSION} and nvcc is ${CMAKE_CUDA_COMPILER_VERSION}: "
                            "their first numbers must agree")
        list(JOIN TETRIS_CUDA_WHY "" TETRIS_CUDA_WHY)
      endif()
    endif()
    if(TETRIS_CUDA STREQUAL "1" AND NOT TETRIS_CUDA_BUILT)
      message(FATAL_ERROR "TETRIS_CUDA=1, but CUDA kernels cannot be built: ${TETRIS_CUDA_WHY}")
    endif()
  endif()
  if(TETRIS_CUDA_BUILT)
    tetris_cuda_library(tetris_cuda STATIC ${TETRIS_CUDA_HOST_SOURCES})
  elseif(NOT TETRIS_CUDA STREQUAL "0" AND NOT TETRIS_NVCC_WHY)
    tetris_cuda_objects()
  endif()
endmacro()

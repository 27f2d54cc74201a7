option(TETRIS_BUILD_EXTENSION "build the torch extension module _C" ON)
option(TETRIS_BUILD_TESTS "build the C++ tests (needs googletest)" OFF)
option(TETRIS_BUILD_BENCHMARKS "build the C++ benchmark of the kernels (needs google-benchmark)" OFF)
option(TETRIS_EMULATED_OPS "build the CUDA ops over the emulator, for tests (needs TETRIS_BUILD_TESTS)" OFF)
set(TETRIS_SANITIZE "" CACHE STRING "sanitizers for all targets, e.g. address,undefined")

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
# Our own checks are assert(); they stay in debug and sanitizer builds only.
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")

# What every target of ours is compiled with.
function(tetris_target name)
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
  target_compile_options(${name} PRIVATE -Wall -Wextra -Wno-unknown-pragmas)
  if(TETRIS_SANITIZE)
    # A report ends the program, as a failure has to, and needs no more than lines: without the way back
    # and all that -g keeps, files compile in half to three quarters of the time.
    target_compile_options(${name} PUBLIC -fsanitize=${TETRIS_SANITIZE} -fno-sanitize-recover=all
      -fno-omit-frame-pointer -g1)
    target_link_options(${name} PUBLIC -fsanitize=${TETRIS_SANITIZE})
  endif()
endfunction()

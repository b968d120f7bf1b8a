# Adds the CUDA kernels to _C. Without nvcc, or if it does not work, the module is built without
# them: most users have no GPU, and their installation must not fail because of it.

set(CUDA_MISSING "")
set(CUDA_ARCHITECTURES_BUILT "")
if(FUSED_ATTN_SANITIZE)
  set(CUDA_MISSING "a build with sanitizers leaves it out")
elseif(NOT FUSED_ATTN_CUDA)
  set(CUDA_MISSING "it was switched off (FUSED_ATTN_CUDA=OFF)")
  if(FUSED_ATTN_CUDA_WHY)  # setup.py has tried
    set(CUDA_MISSING "${FUSED_ATTN_CUDA_WHY}")
  endif()
else()
  # Compiles a test program in a separate project, so that a broken compiler fails nothing else.
  set(ASKED_FOR "${CMAKE_CUDA_ARCHITECTURES}")
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # look again: it may have been installed since
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
      set(CUDA_MISSING "nvcc is of version ${CMAKE_CUDA_COMPILER_VERSION}, and 12.0 is needed")
    endif()
  else()
    if(DEFINED ENV{CUDACXX})
      set(NVCC $ENV{CUDACXX})
    else()
      find_program(NVCC nvcc NO_CMAKE_SYSTEM_PATH NO_CACHE)
    endif()
    if(NVCC)
      set(CUDA_MISSING "CMake's test of the compiler ${NVCC} failed")
    else()
      set(CUDA_MISSING "no CUDA compiler (nvcc) was found")
    endif()
  endif()
endif()
if(CUDA_MISSING AND FUSED_ATTN_CUDA STREQUAL "ON")
  message(FATAL_ERROR "FUSED_ATTN_CUDA is ON, but ${CUDA_MISSING}")
endif()

if(NOT CUDA_MISSING)
  # Machine code for 8.x, 9.x and 12.x, and code that drivers compile for what is in between or
  # comes after.
  if(ASKED_FOR)
    set(CUDA_ARCHITECTURES_BUILT "${ASKED_FOR}")
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(CUDA_ARCHITECTURES_BUILT 80-real 90)
  else()
    set(CUDA_ARCHITECTURES_BUILT 80-real 90 120)
  endif()
  # enable_language left its own choice there, which would be taken for the user's the next time.
  set(CMAKE_CUDA_ARCHITECTURES "${CUDA_ARCHITECTURES_BUILT}" CACHE STRING "CUDA architectures"
      FORCE)
  add_library(fused_attn_cuda OBJECT csrc/cuda/driver.cu csrc/cuda/decode_f32.cu
                                     csrc/cuda/decode_bf16.cu csrc/cuda/decode_f16.cu)
  target_include_directories(fused_attn_cuda PRIVATE csrc)
  # The static runtime looks for the driver when it is first called: _C imports without one.
  set_target_properties(fused_attn_cuda _C PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
    CUDA_ARCHITECTURES "${CUDA_ARCHITECTURES_BUILT}")
  target_compile_options(fused_attn_cuda PRIVATE -Xcompiler=-Wall,-Wextra,-fvisibility=hidden)
  target_compile_definitions(_C PRIVATE FUSED_ATTN_CUDA)
  target_link_libraries(_C PRIVATE fused_attn_cuda)
endif()
message(STATUS "CUDA: ${CUDA_ARCHITECTURES_BUILT}${CUDA_MISSING}")
set(FUSED_ATTN_CUDA_MISSING "${CUDA_MISSING}" CACHE INTERNAL "Read by setup.py")

string(REPLACE ";" " " ARCHITECTURES "${CUDA_ARCHITECTURES_BUILT}")
file(CONFIGURE OUTPUT cuda_build.h @ONLY CONTENT
"// What CMake found out about CUDA.
#pragma once
constexpr char kCudaArchitectures[] = \"@ARCHITECTURES@\";
constexpr char kCudaMissing[] = R\"why(@CUDA_MISSING@)why\";
")
target_include_directories(_C PRIVATE ${CMAKE_CURRENT_BINARY_DIR})

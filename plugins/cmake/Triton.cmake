# Finds Triton, the compiler of the GPU kernels. Sets FWL_TRITON_FOUND, and FWL_TRITON_PATH to the folder
# in which Python finds the package `triton`: empty if it is installed, else that of a pinned PyPI wheel,
# which is downloaded.
set(FWL_TRITON_FOUND FALSE)
set(FWL_TRITON_PATH "")
if(FWL_COMPILED_KERNELS)
  set(FWL_TRITON_FOUND TRUE)
  return()
endif()

execute_process(COMMAND "${Python3_EXECUTABLE}" -c "import triton" RESULT_VARIABLE _missing
                OUTPUT_QUIET ERROR_QUIET)
if(NOT _missing)
  set(FWL_TRITON_FOUND TRUE)
  return()
endif()

set(_fetched "${CMAKE_CURRENT_BINARY_DIR}/triton")
if(FWL_FETCH_HEADERS AND NOT EXISTS "${_fetched}/triton")
  message(STATUS "Downloading Triton from PyPI (200 MB)")
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -m pip install --quiet --no-deps --only-binary :all:
            --disable-pip-version-check --target "${_fetched}" "triton==3.8.0"
    OUTPUT_QUIET ERROR_QUIET)
endif()
if(EXISTS "${_fetched}/triton")
  set(FWL_TRITON_FOUND TRUE)
  set(FWL_TRITON_PATH "${_fetched}")
endif()

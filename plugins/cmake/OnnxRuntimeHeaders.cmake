# Sets FWL_ONNXRUNTIME_INCLUDE_DIR, the folder of onnxruntime_c_api.h: from the SDK the user named,
# else from the system, else from a pinned PyPI wheel.
set(_suffixes include include/onnxruntime include/onnxruntime/core/session
              include/core/session onnxruntime/core/session)

if(FWL_ONNXRUNTIME_SDK)
  find_path(FWL_ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
            PATHS "${FWL_ONNXRUNTIME_SDK}" PATH_SUFFIXES ${_suffixes} NO_DEFAULT_PATH)
  if(NOT FWL_ONNXRUNTIME_INCLUDE_DIR)
    message(FATAL_ERROR "There is no onnxruntime_c_api.h below FWL_ONNXRUNTIME_SDK, "
                        "'${FWL_ONNXRUNTIME_SDK}'; expected it in 'include'.")
  endif()
endif()
find_path(FWL_ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h PATH_SUFFIXES ${_suffixes})

if(NOT FWL_ONNXRUNTIME_INCLUDE_DIR AND FWL_FETCH_HEADERS)
  find_package(Python3 COMPONENTS Interpreter REQUIRED)
  set(_fetched "${CMAKE_CURRENT_BINARY_DIR}/headers")
  message(STATUS "Fetching ONNX Runtime's headers from PyPI")
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/../tools/fetch_headers.py" onnxruntime
            "${_fetched}"
    RESULT_VARIABLE _failed)
  if(NOT _failed)
    set(FWL_ONNXRUNTIME_INCLUDE_DIR "${_fetched}" CACHE PATH "" FORCE)
  endif()
endif()

if(NOT FWL_ONNXRUNTIME_INCLUDE_DIR)
  message(FATAL_ERROR "ONNX Runtime's headers are missing. Name an SDK with "
                      "-DFWL_ONNXRUNTIME_SDK=..., or leave the library out with "
                      "-DFWL_ONNXRUNTIME=OFF.")
endif()
message(STATUS "ONNX Runtime's headers: ${FWL_ONNXRUNTIME_INCLUDE_DIR}")

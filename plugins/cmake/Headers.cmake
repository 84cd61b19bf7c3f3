# Third-party headers: from the SDK that the user named, else from the system, else from a pinned
# PyPI wheel.
#
# fwl_find_headers(WHAT <name in tools/fetch_headers.py> TITLE <its name in messages>
#                  HEADER <file> SDK <variable of the user> RESULT <variable>
#                  SUFFIXES <folders below an SDK>...)
#
# The result is the folder of the header, or empty.
function(fwl_find_headers)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "WHAT;TITLE;HEADER;SDK;RESULT" "SUFFIXES")
  if(${arg_SDK})
    unset(${arg_RESULT} CACHE) # of a configuration before, with another SDK or none
    find_path(${arg_RESULT} ${arg_HEADER}
              PATHS "${${arg_SDK}}" PATH_SUFFIXES ${arg_SUFFIXES} NO_DEFAULT_PATH)
    if(NOT ${arg_RESULT})
      message(FATAL_ERROR "There is no ${arg_HEADER} below ${arg_SDK}, '${${arg_SDK}}'; expected "
                          "it in 'include'.")
    endif()
  endif()
  find_path(${arg_RESULT} ${arg_HEADER} PATH_SUFFIXES ${arg_SUFFIXES})
  if(NOT ${arg_RESULT} AND FWL_FETCH_HEADERS)
    set(fetched "${CMAKE_CURRENT_BINARY_DIR}/headers")
    message(STATUS "Fetching ${arg_TITLE}'s headers from PyPI")
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/../tools/fetch_headers.py"
              ${arg_WHAT} "${fetched}"
      RESULT_VARIABLE failed)
    if(NOT failed)
      set(${arg_RESULT} "${fetched}" CACHE PATH "" FORCE)
    endif()
  endif()
  if(${arg_RESULT})
    message(STATUS "${arg_TITLE}'s headers: ${${arg_RESULT}}")
  endif()
endfunction()

# Finds third-party headers: in the SDK that the user gives, else in the system, else in a pinned PyPI
# wheel, which it downloads.
#
# fwl_find_headers(WHAT <name in tools/fetch_headers.py> TITLE <name in messages>
#                  HEADER <file to look for> SDK <variable with the user's folder>
#                  RESULT <variable to set> SUFFIXES <folders below an SDK to search>...)
#
# RESULT becomes the folder of the header, or stays empty.
function(fwl_find_headers)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "WHAT;TITLE;HEADER;SDK;RESULT" "SUFFIXES")
  if(${arg_SDK})
    unset(${arg_RESULT} CACHE) # from an earlier configuration, with another SDK or none
    find_path(${arg_RESULT} ${arg_HEADER}
              PATHS "${${arg_SDK}}" PATH_SUFFIXES ${arg_SUFFIXES} NO_DEFAULT_PATH)
    if(NOT ${arg_RESULT})
      message(FATAL_ERROR "There is no ${arg_HEADER} below '${${arg_SDK}}', the value of ${arg_SDK}; "
                          "expected it in the folder 'include'.")
    endif()
  endif()
  find_path(${arg_RESULT} ${arg_HEADER} PATH_SUFFIXES ${arg_SUFFIXES})
  if(NOT ${arg_RESULT} AND FWL_FETCH_HEADERS)
    set(fetched "${CMAKE_CURRENT_BINARY_DIR}/headers")
    message(STATUS "Downloading ${arg_TITLE}'s headers from PyPI")
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

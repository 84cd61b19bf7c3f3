# fwl_plugin_library(target entry...): the settings of a library that ONNX Runtime or TensorRT loads. It
# brings its own C++ runtime, exports only the named entry points, and is installed where the Python
# package looks.
function(fwl_plugin_library target)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_link_options(${target} PRIVATE -static-libstdc++ -static-libgcc)
    if(FWL_SANITIZE)
      target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL)
    else()
      # The library exports nothing of the C++ runtime either, whichever compiler brings it: see
      # exports.map of libfwl. Compilers without --exclude-libs, such as zig, know version scripts.
      set(map "${CMAKE_CURRENT_BINARY_DIR}/${target}.map")
      string(REPLACE ";" "; " entries "${ARGN}")
      file(WRITE "${map}" "{ global: ${entries}; local: *; };\n")
      # nodelete, because a library that zig links runs its destructors not when ONNX Runtime unloads
      # it but at the end of the process, when its code would be gone.
      target_link_options(${target} PRIVATE -Wl,--no-undefined "-Wl,--version-script=${map}"
                          -Wl,-z,nodelete)
    endif()
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime)
endfunction()

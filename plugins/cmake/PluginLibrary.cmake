# fwl_plugin_library(target): the settings of a library that ONNX Runtime or TensorRT loads. It brings its
# own C++ runtime, exports its entry points only, and is installed where the Python package looks.
function(fwl_plugin_library target)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_link_options(${target} PRIVATE -static-libstdc++ -static-libgcc
                        -Wl,--exclude-libs,ALL)
    if(NOT FWL_SANITIZE)
      target_link_options(${target} PRIVATE -Wl,--no-undefined)
    endif()
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime)
endfunction()

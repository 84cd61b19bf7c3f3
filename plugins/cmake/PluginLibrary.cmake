# fwl_plugin_library(target): what all libraries share that another program loads. They bring their
# own C++ runtime, export nothing but their entry points, and lie where the package looks.
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

# Gives the target quantrain::torch: libtorch's headers and libraries.
#
# A program that has called find_package(Torch) keeps its own. Otherwise the libraries of the installed wheel are imported directly: its
# TorchConfig.cmake refuses a CUDA wheel where no CUDA toolkit is installed, and picks unsupported architectures where one is.
# QUANTRAIN_TORCH_PACKAGE=ON (or a Torch_DIR) asks for find_package(Torch) instead, as a libtorch archive without Python needs.
if(TARGET quantrain::torch)
  return()
endif()

option(QUANTRAIN_TORCH_PACKAGE "Find libtorch by find_package(Torch) instead of asking Python" OFF)

if(NOT TARGET torch AND (QUANTRAIN_TORCH_PACKAGE OR Torch_DIR))
  find_package(Torch REQUIRED)
endif()
add_library(quantrain::torch INTERFACE IMPORTED)
if(TARGET torch)
  target_link_libraries(quantrain::torch INTERFACE ${TORCH_LIBRARIES})
  target_include_directories(quantrain::torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
  get_filename_component(QUANTRAIN_TORCH_ROOT "${TORCH_INSTALL_PREFIX}" ABSOLUTE)
else()
  if(NOT QUANTRAIN_TORCH_ROOT)
    # Not FindPython: its cached result would bind a later find_package(Python) of the program that includes this.
    find_program(QUANTRAIN_PYTHON NAMES python3 python HINTS ENV VIRTUAL_ENV PATH_SUFFIXES bin)
    if(Python_EXECUTABLE)
      set(QUANTRAIN_PYTHON "${Python_EXECUTABLE}")
    endif()
    execute_process(
      COMMAND ${QUANTRAIN_PYTHON} -c "import importlib.util as u; s = u.find_spec('torch'); print(list(s.submodule_search_locations)[0] if s else '')"
      OUTPUT_VARIABLE QUANTRAIN_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(NOT EXISTS "${QUANTRAIN_TORCH_ROOT}/include/ATen")
    message(FATAL_ERROR "quantrain: expected PyTorch in Python '${QUANTRAIN_PYTHON}', got none. Install torch 2.11 there, or set "
                        "QUANTRAIN_TORCH_ROOT to its folder, or Torch_DIR to a libtorch's share/cmake/Torch.")
  endif()
  foreach(library c10 torch_cpu torch)
    add_library(quantrain::imported_${library} SHARED IMPORTED)
    set_target_properties(quantrain::imported_${library} PROPERTIES IMPORTED_LOCATION
                                                                    "${QUANTRAIN_TORCH_ROOT}/lib/lib${library}.so")
    target_link_libraries(quantrain::torch INTERFACE quantrain::imported_${library})
  endforeach()
  if(EXISTS "${QUANTRAIN_TORCH_ROOT}/lib/libtorch_cuda.so")
    # --no-as-needed: nothing refers to a symbol of libtorch_cuda, and without it libtorch registers no CUDA operator.
    target_link_options(quantrain::torch INTERFACE "LINKER:--push-state,--no-as-needed,${QUANTRAIN_TORCH_ROOT}/lib/libtorch_cuda.so,--pop-state")
    target_link_options(quantrain::torch INTERFACE "LINKER:-rpath-link,${QUANTRAIN_TORCH_ROOT}/../nvidia/cu13/lib")
  endif()
  target_include_directories(quantrain::torch SYSTEM INTERFACE "${QUANTRAIN_TORCH_ROOT}/include"
                                                               "${QUANTRAIN_TORCH_ROOT}/include/torch/csrc/api/include")
endif()
find_package(Threads REQUIRED)
target_link_libraries(quantrain::torch INTERFACE Threads::Threads)

# Target quantrain::cutlass: CUTLASS's headers, needed to build only. From QUANTRAIN_CUTLASS_DIR (a folder with include/ and tools/util/include/)
# where set, else from the PyPI package nvidia-cutlass, fetched once into the build folder by pip, with pip's own settings.

set(QUANTRAIN_CUTLASS_VERSION 4.2.0.0)
set(QUANTRAIN_CUTLASS_DIR "" CACHE PATH "CUTLASS source folder; empty: fetch nvidia-cutlass ${QUANTRAIN_CUTLASS_VERSION} from PyPI")

set(cutlass_root "${QUANTRAIN_CUTLASS_DIR}")
if(NOT cutlass_root)
  set(cutlass_fetched "${CMAKE_BINARY_DIR}/cutlass-${QUANTRAIN_CUTLASS_VERSION}")
  set(cutlass_root "${cutlass_fetched}/cutlass_library/source")
  if(NOT EXISTS "${cutlass_root}/include/cutlass/cutlass.h")
    find_package(Python REQUIRED COMPONENTS Interpreter)
    message(STATUS "quantrain: fetching nvidia-cutlass ${QUANTRAIN_CUTLASS_VERSION} (6 MB)")
    # --no-deps: its dependencies are for its own Python code. The headers are in the wheel.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-deps --dest "${cutlass_fetched}"
              "nvidia-cutlass==${QUANTRAIN_CUTLASS_VERSION}"
      RESULT_VARIABLE cutlass_result)
    file(GLOB cutlass_wheel "${cutlass_fetched}/nvidia_cutlass-*.whl")
    if(cutlass_result OR NOT cutlass_wheel)
      message(FATAL_ERROR "quantrain: could not fetch nvidia-cutlass ${QUANTRAIN_CUTLASS_VERSION} with pip: set QUANTRAIN_CUTLASS_DIR to a "
                          "CUTLASS 4.2 checkout, or QUANTRAIN_CUDA=OFF")
    endif()
    file(ARCHIVE_EXTRACT INPUT "${cutlass_wheel}" DESTINATION "${cutlass_fetched}" PATTERNS "cutlass_library/source/include/*"
                                                                                            "cutlass_library/source/tools/util/*")
  endif()
endif()
if(NOT EXISTS "${cutlass_root}/include/cutlass/cutlass.h")
  message(FATAL_ERROR "quantrain: expected CUTLASS in QUANTRAIN_CUTLASS_DIR, got no ${cutlass_root}/include/cutlass/cutlass.h")
endif()

add_library(quantrain_cutlass INTERFACE)
add_library(quantrain::cutlass ALIAS quantrain_cutlass)
target_include_directories(quantrain_cutlass SYSTEM INTERFACE "${cutlass_root}/include" "${cutlass_root}/tools/util/include")

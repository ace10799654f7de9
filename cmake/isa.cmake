# A source file named after an instruction set is compiled with that set's flags, and left out
# where the processor family has no such set.
set(scalar_flags -ffp-contract=off)  # definitions round where they say, on Arm too
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND scalar_flags -fno-unswitch-loops)  # no copy of the norms' loops for each null argument: 3 s
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  # A set that this CPU lacks is not run: under sanitizers, the dearest to compile, only linked.
  set(avx512_checked "")
  if(EFFINFER_SANITIZE AND EXISTS /proc/cpuinfo)
    file(STRINGS /proc/cpuinfo cpu_flags REGEX "^flags" LIMIT_COUNT 1)
    if(NOT cpu_flags MATCHES "avx512vl")
      set(avx512_checked -O0 -fno-sanitize=all)
    endif()
  endif()
  set(avx2_flags -mavx2 -mfma -mf16c -mbmi2)
  set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                   -mprefer-vector-width=512
                   -Wno-uninitialized -Wno-maybe-uninitialized  # gcc 12's own header warns
                   ${avx512_checked})
  set(avx512_vnni_flags ${avx512_flags} -mavx512vnni)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(neon_flags "")
  set(neon_dotprod_flags -march=armv8.2-a+dotprod)
  set(neon_i8mm_flags -march=armv8.2-a+dotprod+i8mm)
endif()

# Adds every .cpp of a folder to a target.
function(effinfer_isa_sources target folder)
  file(GLOB sources CONFIGURE_DEPENDS ${folder}/*.cpp)
  foreach(source ${sources})
    get_filename_component(name ${source} NAME_WE)
    if(NOT name MATCHES "^(scalar|avx2|avx512|avx512_vnni|neon|neon_dotprod|neon_i8mm)$")
      target_sources(${target} PRIVATE ${source})
    elseif(DEFINED ${name}_flags)
      target_sources(${target} PRIVATE ${source})
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${${name}_flags}"
                                                       SKIP_PRECOMPILE_HEADERS ON)
    endif()
  endforeach()
endfunction()

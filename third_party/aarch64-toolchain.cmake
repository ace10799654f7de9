# Cross-compiles for 64-bit Arm with Debian's compiler; CTest runs the programs under qemu. The
# CPU qemu plays is EFFINFER_QEMU_CPU at configure time or QEMU_CPU at test time.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
find_program(EFFINFER_QEMU NAMES qemu-aarch64-static qemu-aarch64)
set(CMAKE_CROSSCOMPILING_EMULATOR ${EFFINFER_QEMU})
